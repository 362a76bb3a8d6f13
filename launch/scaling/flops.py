"""Training FLOPs of a run, by the exact count of its family and by the approximation that papers use.

The exact count adds up the parts of a model; a multiply-add is 2 FLOPs, the backward pass costs twice the forward pass,
norms and the embedding look-up are left out (model/accounting.py). The formula of each part stands with its source
where the part is:

- mLSTM cell, chunkwise: `model.layers.mlstm_cell.mlstm_cell_flops` (arXiv 2510.02228, appendix on FLOP counting).
- mLSTM blocks of xLSTM-7B: `forward_flops` in model/layers/mlstm.py (arXiv 2503.13427, section 3.1).
- mLSTM blocks of the NeurIPS models: `forward_flops` in model/layers/preup_mlstm.py (arXiv 2405.04517, figure 11).
- sLSTM blocks: `forward_flops` in model/layers/slstm.py (arXiv 2405.04517, equations 8 to 18).
- attention blocks (Llama): `forward_flops` in model/layers/attention.py, causal half (arXiv 2510.02228).
- feed-forward layers: `token_flops` in model/layers/feed_forward.py, and 2 FLOPs for each weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import ModelConfig


def run_flops(model: ModelConfig, context: int, tokens: float) -> float:
    """Exact training FLOPs of `tokens` tokens in sequences of `context` tokens.

    With chunks of the mLSTM as in the published counts, whatever GPU it ran on: runs of a table must be counted alike.
    """
    # Tables of runs are read without torch.
    from model.accounting import training_flops_per_token

    return tokens * training_flops_per_token(model, context)


def six_n_d(parameters: float, tokens: float) -> float:
    """C = 6 N D: 2 N for the forward and 4 N for the backward pass of each token (arXiv 2001.08361, section 2.1).

    It counts the embedding as a matrix product, and no attention and no cell.
    """
    return 6.0 * parameters * tokens
