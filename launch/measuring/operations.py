"""Times of single operations without the host's: products, a copy, cells.

A GPU is kept busy until the host has launched what is timed. Inputs are random: a product of zeros takes less power,
and less time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention_mask
from kernels.mlstm import mlstm
from kernels.slstm import slstm
from train.estimate.calibration import CellPoint, ProductPoint

# torch.cuda._sleep counts cycles; no GPU here runs faster than this.
_CYCLES_PER_SECOND = 2.0e9
_LONGEST_PAUSE = 0.03
_DOCUMENT_TOKENS = 1000
# For which a call is repeated.
_SECONDS = {"cuda": 0.25, "cpu": 0.02}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median time of `call`, repeated after calls that compile and warm up; at least 5 times."""
    for_seconds = _SECONDS[device.type]
    for _ in range(2):
        call()
    _wait(device)
    began = time.perf_counter()
    call()
    issued = time.perf_counter() - began
    _wait(device)
    once = time.perf_counter() - began
    times = []
    for _ in range(min(200, max(5, int(for_seconds / (once + 1e-6))))):
        times.append(_on_gpu(call, device, issued) if device.type == "cuda" else _by_clock(call))
    return statistics.median(times)


def _on_gpu(call: Callable[[], object], device: torch.device, issued: float) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * min(1.5 * issued + 1e-4, _LONGEST_PAUSE)))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _by_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device, mib: int) -> float:
    """Bytes a second, read and written, of a copy of so many MiB."""
    source = torch.ones(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def product(tokens: int, width: int, device: torch.device) -> ProductPoint:
    """A dense layer of `width` in and out over so many tokens."""
    x, dy = (_noise(device, tokens, width) for _ in range(2))
    weight = _noise(device, width, width)

    def three() -> tuple[Tensor, Tensor, Tensor]:
        return x @ weight.T, dy @ weight, dy.T @ x

    return ProductPoint(tokens, width, seconds_of(three, device))


def mlstm_cell(batch: int, length: int, heads: int, key_dim: int, value_dim: int, device: torch.device) -> CellPoint:
    """The mLSTM with gates as at the beginning of a run, and documents."""
    tokens = (batch, length, heads)
    q, k = (_noise(device, *tokens, key_dim).requires_grad_() for _ in range(2))
    v = _noise(device, *tokens, value_dim).requires_grad_()
    igate = (torch.randn(tokens, device=device) - 10).requires_grad_()
    fgate = (torch.randn(tokens, device=device) + torch.linspace(3, 6, heads, device=device)).requires_grad_()
    starts = _starts(batch, length, device)

    def forward() -> Tensor:
        return mlstm(q, k, v, igate, fgate, document_start=starts)[0]

    times = _forward_and_both(forward, [q, k, v, igate, fgate], device)
    return CellPoint("mlstm", heads, key_dim, value_dim, batch, length, *times)


def slstm_cell(batch: int, length: int, heads: int, width: int, device: torch.device) -> CellPoint:
    """The sLSTM, recurrent weights as after some training, and documents."""
    gates = torch.randn(batch, length, 4, heads, width, device=device)
    gates[:, :, 1] += torch.linspace(3, 6, width, device=device)
    gates_x = gates.to(torch.bfloat16).requires_grad_()
    recurrent = (_noise(device, heads, width, 4, width) / (2 * math.sqrt(width))).requires_grad_()
    starts = _starts(batch, length, device)

    def forward() -> Tensor:
        return slstm(gates_x, recurrent, document_start=starts)[0]

    times = _forward_and_both(forward, [gates_x, recurrent], device)
    return CellPoint("slstm", heads, width, width, batch, length, *times)


def attention_cell(batch: int, length: int, heads: int, width: int, device: torch.device) -> CellPoint:
    """Causal attention as the attention layer calls it: with a mask of documents."""
    q, k, v = (_noise(device, batch, heads, length, width).requires_grad_() for _ in range(3))
    mask = attention_mask(length, _starts(batch, length, device), None)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    times = _forward_and_both(forward, [q, k, v], device)
    return CellPoint("attention", heads, width, width, batch, length, *times)


def _forward_and_both(forward: Callable[[], Tensor], leaves: list[Any], device: torch.device) -> tuple[float, float]:
    upstream = torch.randn_like(forward().detach())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, upstream)

    with torch.no_grad():
        alone = seconds_of(forward, device)
    return alone, seconds_of(both, device)


def _noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def _starts(batch: int, length: int, device: torch.device) -> Tensor:
    starts = torch.rand(batch, length, device=device) < 1 / _DOCUMENT_TOKENS
    starts[:, 0] = True
    return starts
