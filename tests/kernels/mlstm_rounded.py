"""The chunkwise mLSTM in PyTorch with the roundings of tensor cores: what a 16-bit kernel can be held to.

Every matrix product takes operands of the inputs' precision and sums in float32, forward and backward; the read-out is
kept in the inputs' precision for the backward pass; all else is float32. For float32 inputs nothing is rounded. Where
the normaliser n^T q happens to be nearly zero, any such computation is far from the exact result.

Axes: B batch, NH heads, NC chunks, L tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mlstm.gates import bounded_below, log_carry, log_weights, same_document
from kernels.mlstm.inputs import CellSettings, cell_inputs, prepare
from kernels.mlstm.reference import _chunk_stabilisers
from kernels.mlstm.state import MLSTMState


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, dtype):
        a, b = (x.to(dtype).float() for x in (a, b))
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.to(ctx.dtype).float()
        return grad @ b.transpose(-1, -2), a.transpose(-1, -2) @ grad, None


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numerator, query_normaliser, floor, eps, dtype):
        denominator = torch.maximum(query_normaliser.abs(), floor) + eps
        h = (numerator / denominator[..., None]).to(dtype)
        sign = query_normaliser.sign() * (query_normaliser.abs() > floor)
        ctx.save_for_backward(h, denominator, sign)
        return h.float()

    @staticmethod
    def backward(ctx, grad):
        h, denominator, sign = ctx.saved_tensors
        return grad / denominator[..., None], -(grad * h.float()).sum(-1) / denominator * sign, None, None, None


def mlstm_rounded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    gate: str = "exp",
    normaliser: bool = True,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Tensor, MLSTMState | None]:
    """Arguments and result as kernels.mlstm.mlstm."""
    dtype = v.dtype
    inputs = cell_inputs(k, v, igate_preact, fgate_preact, document_start, initial_state)
    x = prepare(q, inputs, CellSettings(gate, normaliser, eps))
    length = q.shape[1]
    padding = -length % chunk_size

    def product(a, b):
        return _Product.apply(a, b, dtype)

    def in_chunks(sequence):
        return sequence.unflatten(2, (-1, chunk_size))

    queries, keys, values = (in_chunks(F.pad(y, (0, 0, 0, padding))) for y in (x.q, x.k, x.v))
    log_input = in_chunks(F.pad(x.log_input, (0, padding), value=-torch.inf))
    log_forget = in_chunks(F.pad(x.log_forget, (0, padding)))
    document = torch.cat([x.document, x.document[:, -1:].expand(-1, padding)], dim=1)
    document = in_chunks(document[:, None])
    before = F.pad(document[..., :-1, -1], (1, 0))
    readable = same_document(document)
    log_weight = log_weights(log_input, log_forget, readable)
    log_kept = log_carry(log_forget, readable)
    continues = document == before[..., None]
    m, m_before = _chunk_stabilisers(log_weight, log_kept, continues, x.state.m, gate)
    weights = torch.exp(log_weight - bounded_below(m)[..., None])
    carried = torch.exp((log_kept + m_before[..., None] - m).masked_fill(~continues, -torch.inf))

    weighted = keys * weights[..., -1, :, None]
    added, added_n = product(weighted.transpose(-1, -2), values), weighted.sum(-2)
    C, n = x.state.C, x.state.n
    matrices, vectors = [], []
    for chunk in range(added.shape[2]):
        matrices.append(C)
        vectors.append(n)
        kept = carried[:, :, chunk, -1]
        C = kept[..., None, None] * C + added[:, :, chunk]
        n = kept[..., None] * n + added_n[:, :, chunk]
    scores = product(queries, keys.transpose(-1, -2)) * weights
    matrices, vectors = torch.stack(matrices, 2), torch.stack(vectors, 2)
    read = product(scores, values) + carried[..., None] * product(queries, matrices)
    total = scores.sum(-1) + carried * (queries * vectors[..., None, :]).sum(-1)
    h = _ReadOut.apply(read, total, torch.exp(-m), eps, dtype) if normaliser else read
    h = h.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)
    return h, MLSTMState(C, n, m[:, :, -1, -1]) if return_state else None
