"""Linear attention whose memory decays: the recurrence of RetNet, GLA, Mamba-2 and Gated DeltaNet.

    S[t] = a[t] S[t - 1] + k[t] v[t]^T                                    y[t] = scale S[t]^T q[t]
    S[t] = a[t] (S[t - 1] - b[t] k[t] (S[t - 1]^T k[t])^T) + b[t] k[t] v[t]^T         with the delta rule

a = exp(log_decay) is one number of a head (RetNet, arXiv 2307.08621; Mamba-2, arXiv 2405.21060, where it comes of the
step size; Gated DeltaNet, arXiv 2412.06464, equation 10, with b) or one of each key feature (GLA, arXiv 2312.06635).

Backends: "reference" goes token by token (`reference`), "fla" calls the kernels of flash-linear-attention on a GPU
(`fla_kernels`).

Axes: B batch, S sequence, NH heads, DK key and DV value dimension of a head.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from kernels.linear_recurrence.inputs import RecurrenceInputs
from kernels.linear_recurrence.reference import linear_recurrence_reference

BACKENDS = ("auto", "reference", "fla")
# Asked once: torch.compile cannot trace into the question.
HAS_FLA = importlib.util.find_spec("fla") is not None
_INSTALL = "install it with pip install 'xlstm-pretrain[rivals]'"

__all__ = ["BACKENDS", "HAS_FLA", "RecurrenceInputs", "linear_recurrence", "linear_recurrence_reference"]


def linear_recurrence(
    inputs: RecurrenceInputs,
    *,
    document_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """What each token reads from the memory of its document.

    Args:
        inputs: queries, keys, values and decays.
        document_start: [B, S] bool: the memory is emptied before these tokens.
        initial_state: [B, NH, DK, DV], float32 at least: the memory before the first token; None: empty.
        return_state: also give the memory behind the last token.
        backend: "auto" is fla on a CUDA device, except for single tokens, and the reference elsewhere.

    Returns:
        y [B, S, NH, DV] in v's dtype, and the memory [B, NH, DK, DV] in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown linear recurrence backend {backend!r}; use one of {', '.join(BACKENDS)}")
    on_gpu = inputs.v.device.type == "cuda"
    if backend == "fla" and not on_gpu:
        raise ValueError(
            f"linear recurrence backend 'fla' needs a CUDA device, and the tensors are on '{inputs.v.device}'; use "
            "backend 'reference' or 'auto'"
        )
    if backend == "reference" or not on_gpu or (backend == "auto" and inputs.v.shape[1] == 1):
        return linear_recurrence_reference(inputs, document_start, initial_state, return_state)
    if not HAS_FLA:
        raise ValueError(
            f"linear recurrences run on a GPU by the package fla-core, which is missing; {_INSTALL}, or use backend "
            "'reference', which is slow"
        )
    from kernels.linear_recurrence.fla_kernels import linear_recurrence_fla

    return linear_recurrence_fla(inputs, document_start, initial_state, return_state)
