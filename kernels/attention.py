"""Causal softmax attention within documents, over all earlier tokens or a window of them, with sinks or without.

`attention` calls PyTorch's fused attention, `attention_reference` writes the definition out. A window is computed in
blocks of queries: each sees its own block of keys and the one before (arXiv 2004.05150 §3.1), so that time and memory
grow with S times the window.

A sink is a learned number per head that takes part in the softmax as the score of one more token, whose value is zero
(the model card of gpt-oss, arXiv 2508.10925 §2.1). It lets a head attend to nothing; at zero it makes the softmax off
by one.

Axes: B batch, S queries, T cached tokens before them, NH query heads, NKV key/value heads, DH dimension of a head,
L queries of a block, K keys that a block sees, N blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import autocast_disabled, compute_dtype

# Features by which a head is made wider for a sink: fused attention wants multiples of 8.
SINK_FEATURES = 8


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_start: Tensor | None = None,
    carried: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(DH)) v of every query over the tokens that it may see.

    Args:
        q: [B, S, NH, DH].
        k, v: [B, T + S, NKV, DH] in q's dtype; NKV divides NH. The first T tokens came before the call.
        document_start: [B, S] bool: no query sees what lies before the first token of its document.
        carried: [B] int64: how many of the T tokens, the last ones, belong to the document that is open when the call
            begins; None where T is 0.
        window: a query sees itself and the window - 1 tokens before it; None: all of its document.
        sinks: [NH], any floating dtype; None: none.
        backend: "auto" is PyTorch's fused attention, "reference" the definition.

    Returns:
        [B, S, NH, DH] in q's dtype.
    """
    if backend == "reference":
        return attention_reference(q, k, v, document_start=document_start, carried=carried, window=window, sinks=sinks)
    batch, length, heads, width = q.shape
    cached = k.shape[1] - length
    if window is not None and window >= cached + length:
        window = None
    if document_start is None and carried is None and window is None and sinks is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != heads).transpose(1, 2)
    block = length if window is None else min(length, window)
    before = cached if block == length or window is None else window
    blocks = -(-length // block)
    mask = attention_mask(length, document_start, carried, cached=cached, window=window, device=q.device)
    q = _padded(q, 0, blocks * block - length).reshape(batch * blocks, block, heads, width)
    k, v = (_overlapping(_padded(x, before - cached, blocks * block - length), before, block) for x in (k, v))
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)
    y = masked_attention(q, k, v, mask, sinks)
    return y.reshape(batch, blocks * block, heads, width)[:, :length]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Fused attention of q [B, L, NH, DH] over k and v [B, K, NKV, DH], where mask [B or 1, L, K] is True.

    `sinks`: [NH] or None. Every query sees a key. Returns [B, L, NH, DH].
    """
    width, scale = q.shape[-1], None
    if sinks is not None:
        scale = width**-0.5
        q, k, v, mask = _with_sinks(q, k, v, mask, sinks, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = k.shape[1] != q.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=is_grouped)
    return y.transpose(1, 2)[..., :width]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_start: Tensor | None = None,
    carried: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, all pairs of tokens at once, in float32 at least; arguments and result as for `attention`."""
    length, heads, dtype = q.shape[1], q.shape[2], compute_dtype(q)
    cached = k.shape[1] - length
    groups = heads // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(groups, dim=2) for x in (k, v))
    places = torch.arange(cached + length, device=q.device)
    document = _documents(length, document_start, carried, cached, q.device)
    distance = places[cached:, None] - places
    seen = (distance >= 0) & (document[:, cached:, None] == document[:, None, :])
    if window is not None:
        seen = seen & (distance < window)
    with autocast_disabled(q):
        scores = torch.einsum("bshd,bthd->bhst", q.to(dtype), keys) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : cached + length]
        return torch.einsum("bhst,bthd->bshd", weights, values).to(q.dtype)


def attention_mask(
    length: int,
    document_start: Tensor | None,
    carried: Tensor | None,
    *,
    cached: int = 0,
    window: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys each query may see: [B or 1, N, L, K] bool, as `attention` lays out blocks; without a window N is 1.

    `device`: of the mask, where neither document_start nor carried says it.
    """
    given = document_start if document_start is not None else carried
    device = given.device if given is not None else device
    block = length if window is None else min(length, window)
    before = cached if block == length or window is None else window
    padding = -(-length // block) * block - length
    document = _documents(length, document_start, carried, cached, device)
    # Padded queries belong to the last document: a row of the mask without any key would give NaN.
    document = torch.cat([document, document[:, -1:].expand(-1, padding)], dim=1)
    document = F.pad(document, (before - cached, 0), value=-1)
    of_queries = document[:, before:].unflatten(1, (-1, block))
    of_keys = document.unfold(1, before + block, block)
    distance = torch.arange(block, device=device)[:, None] + before - torch.arange(before + block, device=device)
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (of_queries[..., :, None] == of_keys[..., None, :])


def keys_per_query(length: int, window: int | None) -> int:
    """K of a pass over `length` tokens without a cache: what is computed, and what the mask holds, for each query."""
    return length if window is None or window >= length else 2 * window


def _documents(
    length: int, document_start: Tensor | None, carried: Tensor | None, cached: int, device: torch.device | None
) -> Tensor:
    """[B or 1, T + S] int64: the number of each token's document, 0 the one that is open before; -1: an ended one."""
    document = torch.zeros(1, length, dtype=torch.int64, device=device)
    if document_start is not None:
        document = document_start.cumsum(dim=1)
    if cached == 0:
        return document
    assert carried is not None, "cached tokens need to be told apart"
    # A number in torch.where would be copied to the device, which waits for it.
    earlier = (torch.arange(cached, device=device) >= cached - carried[:, None]).to(torch.int64) - 1
    rows = max(earlier.shape[0], document.shape[0])
    return torch.cat([earlier.expand(rows, -1), document.expand(rows, -1)], dim=1)


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    """x [B, S, heads, DH] with zeros for so many more tokens on both sides."""
    return x if before == behind == 0 else F.pad(x, (0, 0, 0, 0, before, behind))


def _overlapping(x: Tensor, before: int, block: int) -> Tensor:
    """[B, before + N L, heads, DH] -> [B N, K, heads, DH]: what each block of queries may see, K = before + L."""
    if x.shape[1] == before + block:
        return x
    return x.unfold(1, before + block, block).movedim(-1, 2).flatten(0, 1)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key, of value zero, whose score with every query of a head is its sink.

    The score comes about by one more feature: sink / scale of queries, 1 of that key, 0 of all others. Values become as
    wide as keys, which some fused kernels want.
    """
    feature = (sinks / scale).to(q.dtype)[:, None].expand(*q.shape[:3], 1)
    q = torch.cat([q, F.pad(feature, (0, SINK_FEATURES - 1))], dim=-1)
    key = F.pad(k.new_ones(*k.shape[:1], 1, k.shape[2], 1), (k.shape[3], SINK_FEATURES - 1))
    k = torch.cat([key, F.pad(k, (0, SINK_FEATURES))], dim=1)
    return q, k, F.pad(v, (0, SINK_FEATURES, 0, 0, 1, 0)), F.pad(mask, (1, 0), value=True)
