"""Everything of the mLSTM that depends on the gates alone: weights of each token on each later one, in the log domain.

Axes: B batch, NH heads, L tokens of a chunk. Row t is the token that reads, column j the token that is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("exp", "sigmoid")


def log_gates(igate_preact: Tensor, fgate_preact: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Logarithms of the input gate (exp or sigmoid) and of the forget gate (always sigmoid), same shapes as given."""
    log_input = igate_preact if gate == "exp" else F.logsigmoid(igate_preact)
    return log_input, F.logsigmoid(fgate_preact)


def same_document(document: Tensor) -> Tensor:
    """Document numbers [..., L] -> [..., L, L] bool: may the row's token read the column's?"""
    length = document.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return (document[..., :, None] == document[..., None, :]) & causal


def log_weights(log_input: Tensor, log_forget: Tensor, readable: Tensor) -> Tensor:
    """The log weight of token j in the memory after token t: log_input[j] + sum of log_forget over (j, t].

    The sums are taken term by term for each j. A difference of two running sums would lose precision after strong
    forgetting and would let a number of an earlier document round a later one.

    Args:
        log_input: [..., L].
        log_forget: [..., L].
        readable: [..., L, L] bool (broadcast), the result of same_document.

    Returns:
        [..., L, L], -inf where not readable. Source: TFLA (arXiv 2503.14376), matrix D-tilde.
    """
    length = log_forget.shape[-1]
    after = torch.ones(length, length, dtype=torch.bool, device=log_forget.device).tril(-1)
    decay = log_forget[..., :, None].masked_fill(~after, 0).cumsum(-2)
    return (decay + log_input[..., None, :]).masked_fill(~readable, -torch.inf)


def log_carry(log_forget: Tensor, readable: Tensor) -> Tensor:
    """Sum of log_forget [..., L] from the first token of the chunk that t's document has, up to and including t."""
    return log_forget[..., None, :].masked_fill(~readable, 0).sum(-1)


def bounded_below(stabiliser: Tensor) -> Tensor:
    """Keep -inf (all gates shut) out of differences of log weights and stabiliser, where it would make a NaN."""
    return stabiliser.clamp_min(torch.finfo(stabiliser.dtype).min)


def read_out(numerator: Tensor, query_normaliser: Tensor, stabiliser: Tensor, normaliser: bool, eps: float) -> Tensor:
    """h = numerator / (max(|n q|, exp(-m)) + eps), or the numerator itself without the normaliser.

    Args:
        numerator: [..., DV], C q.
        query_normaliser: [...], n q.
        stabiliser: [...], m.
        normaliser: whether to divide.
        eps: added to the denominator after the max.
    """
    if not normaliser:
        return numerator
    denominator = torch.maximum(query_normaliser.abs(), torch.exp(-stabiliser)) + eps
    return numerator / denominator[..., None]
