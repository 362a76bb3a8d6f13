"""Depthwise causal convolution over time that never looks into an earlier document.

Axes: B batch, S sequence, C channels, K kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import autocast_disabled, compute_dtype


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    document_start: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum over k of weight[K - 1 - k] * x[t - k], for the k that stay inside the document of t.

    Source: xLSTM (arXiv 2405.04517), figures 10 and 11 ("Conv4").

    Args:
        x: [B, S, C], any floating dtype.
        weight: [C, 1, K]; the last tap meets the present token (the layout of torch.nn.Conv1d).
        bias: [C].
        document_start: [B, S] bool, True at the first token of each document; None: no document starts here.
        tail: [B, K - 1, C], the inputs before x, oldest first, as an earlier call returned it; None: zeros.

    Returns:
        y: [B, S, C] in x's dtype, summed in float32 (float64 for float64 inputs).
        new_tail: [B, K - 1, C] in x's dtype: the last K - 1 inputs, zeros in place of those of earlier documents.

    Raises:
        ValueError: the shapes do not fit.
    """
    batch, length, channels = x.shape
    kernel_size = weight.shape[-1]
    history = kernel_size - 1
    _check_shapes(x, weight, bias, document_start, tail)
    if tail is None:
        tail = x.new_zeros(batch, history, channels)
    dtype = compute_dtype(x, weight)
    with autocast_disabled(x):
        extended = torch.cat([tail.to(x.dtype), x], dim=1)
        if document_start is None:
            document = None
            taps_last = weight.to(dtype)
            y = F.conv1d(extended.to(dtype).transpose(1, 2), taps_last, bias.to(dtype), groups=channels).transpose(1, 2)
        else:
            # The tail belongs to the document that is open when x begins, which has number 0.
            document = F.pad(document_start.cumsum(1), (history, 0))
            y = _masked_taps(extended.to(dtype), weight.to(dtype), bias.to(dtype), document)
        new_tail = extended[:, length:].clone()
        if document is not None:
            same_document = document[:, length:] == document[:, -1:]
            new_tail = new_tail.masked_fill(~same_document[..., None], 0)
        return y.to(x.dtype), new_tail


def _masked_taps(extended: Tensor, weight: Tensor, bias: Tensor, document: Tensor) -> Tensor:
    """[B, K - 1 + S, C] and the document numbers [B, K - 1 + S] -> [B, S, C]."""
    kernel_size = weight.shape[-1]
    length = extended.shape[1] - kernel_size + 1
    here = document[:, kernel_size - 1 :]
    y = bias.expand(extended.shape[0], length, -1)
    for tap in range(kernel_size):
        seen = document[:, tap : tap + length] == here
        x = extended[:, tap : tap + length].masked_fill(~seen[..., None], 0)
        y = torch.addcmul(y, x, weight[:, 0, tap])
    return y


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor, document_start: Tensor | None, tail: Tensor | None) -> None:
    batch, length, channels = x.shape
    history = weight.shape[-1] - 1
    if weight.shape != (channels, 1, history + 1) or bias.shape != (channels,):
        raise ValueError(
            f"causal_conv needs weight [C, 1, K] and bias [C] for C = {channels} channels, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if document_start is not None and document_start.shape != (batch, length):
        raise ValueError(f"document_start must be [B, S] = {(batch, length)}, got {tuple(document_start.shape)}")
    if tail is not None and tail.shape != (batch, history, channels):
        raise ValueError(f"tail must be [B, K - 1, C] = {(batch, history, channels)}, got {tuple(tail.shape)}")
