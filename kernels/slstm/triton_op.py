"""The sLSTM on Triton kernels, as operators that torch.compile and activation checkpointing see whole.

Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.integers import next_power_of_two
from kernels.operators import operator
from kernels.precision import autocast_disabled
from kernels.slstm.accounting import kinds_of_derivatives
from kernels.slstm.inputs import check, stabiliser
from kernels.slstm.state import SLSTMState
from kernels.slstm.triton_backward import slstm_backward_kernel
from kernels.slstm.triton_forward import slstm_forward_kernel
from kernels.slstm.triton_tiles import MAX_HEAD_DIM, Tiles, default_tiles
from kernels.triton_support import multiprocessors


def unsupported(gates_x: Tensor, recurrent_kernel: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None if they can."""
    head_dim, dtype = gates_x.shape[-1], _product_dtype(gates_x, recurrent_kernel)
    for name, tensor in (("gates_x", gates_x), ("recurrent_kernel", recurrent_kernel)):
        if tensor.dtype not in MAX_HEAD_DIM:
            return f"{name} is {tensor.dtype}, not one of {', '.join(map(str, MAX_HEAD_DIM))}"
    if head_dim > MAX_HEAD_DIM[dtype]:
        return f"heads with {dtype} weights have at most {MAX_HEAD_DIM[dtype]} units, and these have {head_dim}"
    if gates_x.device.type == "cuda":
        tiles = default_tiles(head_dim, dtype)
        most = multiprocessors(gates_x.device) * tiles.resident
        if tiles.team(head_dim) > most:
            return f"a head of {head_dim} units needs {tiles.team(head_dim)} programs at once, and the GPU has {most}"
    return None


def slstm_triton(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    gate_soft_cap: float | None = None,
) -> tuple[Tensor, SLSTMState | None]:
    """Equal to slstm_recurrent of kernels.slstm.reference. Arguments and result as kernels.slstm.slstm.

    The recurrent matrix product takes both factors in recurrent_kernel's dtype, or in autocast's, and adds in float32;
    gates, memory and states are float32 whatever the inputs.
    """
    check(gates_x, recurrent_kernel, document_start, initial_state, gate_soft_cap)
    recurrent_kernel = recurrent_kernel.to(_product_dtype(gates_x, recurrent_kernel))
    batch, _, _, heads, head_dim = gates_x.shape
    with autocast_disabled(gates_x):
        if initial_state is None:
            initial_state = SLSTMState.empty(batch, heads, head_dim, device=gates_x.device, dtype=torch.float32)
        state = initial_state.to(dtype=torch.float32)
        is_differentiated = torch.is_grad_enabled() and any(
            x.requires_grad for x in (gates_x, recurrent_kernel, state.h, state.c, state.n)
        )
        inputs = CellInputs(gates_x, recurrent_kernel, document_start, state.h, state.c, state.n, state.m.detach())
        results = slstm_cell(inputs, gate_soft_cap, is_differentiated)
    last = SLSTMState(results.last_h, results.last_c, results.last_n, results.last_m)
    return results.outputs, last if return_state else None


def _product_dtype(gates_x: Tensor, recurrent_kernel: Tensor) -> torch.dtype:
    """The dtype of the weights on chip: autocast's where it is on, else their own."""
    device = gates_x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else recurrent_kernel.dtype


def _sent_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype == torch.bfloat16 else torch.int32


class CellInputs(NamedTuple):
    """gates_x, recurrent_kernel, document_start as kernels.slstm.slstm; state h, c, n, m [B, NH, DH] float32."""

    gates_x: Tensor
    recurrent_kernel: Tensor
    document_start: Tensor | None
    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class CellResults(NamedTuple):
    """outputs h [B, S, NH, DH] in gates_x's dtype; `mixed`, the same in the weights' dtype, as the next token sees it
    (empty where the dtypes are equal); derivatives [B, S, kinds, NH, DH], likewise; the last state [B, NH, DH] float32.
    """

    outputs: Tensor
    mixed: Tensor
    derivatives: Tensor
    last_h: Tensor
    last_c: Tensor
    last_n: Tensor
    last_m: Tensor


class OutputGradients(NamedTuple):
    """Gradients of h [B, S, NH, DH], and of h, c / n and m + log n behind the last token, [B, NH, DH] float32."""

    h: Tensor
    last_h: Tensor
    last_average: Tensor
    last_log_n: Tensor


class InputGradients(NamedTuple):
    """Gradients of gates_x, and of c / n and m + log n of the initial state."""

    gates_x: Tensor
    average: Tensor
    log_n: Tensor


def launch_forward(tiles: Tiles, inputs: CellInputs, cap: float | None, with_derivatives: bool) -> CellResults:
    """One launch.

    Args:
        tiles: the division of the work.
        inputs: of the cell.
        cap: the soft cap of i and f, or None.
        with_derivatives: whether a backward pass follows; without, `derivatives` has no element.
    """
    gates_x, recurrent_kernel, document_start, h, c, n, m = inputs
    batch, length, _, heads, head_dim = gates_x.shape
    device, dtype = gates_x.device, recurrent_kernel.dtype
    if gates_x.stride(-1) != 1:
        gates_x = gates_x.contiguous()
    starts = gates_x if document_start is None else document_start.contiguous().view(torch.int8)
    mixed = torch.empty(batch, length, heads, head_dim, device=device, dtype=dtype)
    outputs = mixed if gates_x.dtype == dtype else torch.empty_like(mixed, dtype=gates_x.dtype)
    kinds = kinds_of_derivatives(cap is not None) if with_derivatives else 0
    derivatives = torch.empty(batch, length, kinds, heads, head_dim, device=device, dtype=dtype)
    last = [torch.empty(batch, heads, head_dim, device=device, dtype=torch.float32) for _ in range(4)]
    team, teams, width = tiles.team(head_dim), tiles.teams(batch, heads, head_dim, device), tiles.width(head_dim)
    messages = torch.zeros(2, teams, tiles.rows * width, device=device, dtype=_sent_dtype(dtype))
    with torch.cuda.device_of(gates_x):
        slstm_forward_kernel[(teams * team,)](
            gates_x,
            recurrent_kernel.contiguous(),
            starts,
            h.to(dtype).contiguous(),
            c.contiguous(),
            n.contiguous(),
            stabiliser(n, m).contiguous(),
            mixed,
            messages,
            outputs,
            derivatives,
            *last,
            1.0 if cap is None else cap,
            batch,
            length,
            teams,
            *gates_x.stride()[:4],
            HEADS=heads,
            HEAD_DIM=head_dim,
            TEAM=team,
            UNITS=tiles.units,
            ROWS=tiles.rows,
            WIDTH=width,
            HAS_STARTS=document_start is not None,
            HAS_CAP=cap is not None,
            WITH_DERIVATIVES=with_derivatives,
            WITH_H=outputs is not mixed,
            WARPS=tiles.warps,
            num_warps=tiles.warps,
            num_stages=1,
            launch_cooperative_grid=team > 1,
        )
    # Results of an operator must not share memory.
    return CellResults(outputs, mixed.new_empty(0) if mixed is outputs else mixed, derivatives, *last)


def launch_backward(
    tiles: Tiles,
    grads: OutputGradients,
    recurrent_kernel: Tensor,
    document_start: Tensor | None,
    derivatives: Tensor,
    gates_dtype: torch.dtype,
    with_cap: bool,
) -> InputGradients:
    """One launch.

    Args:
        tiles: the division of the work, not necessarily that of the forward pass.
        grads: of the results.
        recurrent_kernel, document_start: as kernels.slstm.slstm.
        derivatives: of the forward pass.
        gates_dtype: of gates_x.
        with_cap: whether i and f have a soft cap.
    """
    grad_h = grads.h
    batch, length, heads, head_dim = grad_h.shape
    device = grad_h.device
    starts = derivatives if document_start is None else document_start.contiguous().view(torch.int8)
    grad_gates = torch.empty(batch, length, 4, heads, head_dim, device=device, dtype=gates_dtype)
    first = [torch.empty(batch, heads, head_dim, device=device, dtype=torch.float32) for _ in range(2)]
    team, teams, width = tiles.team(head_dim), tiles.teams(batch, heads, head_dim, device), tiles.width(head_dim)
    # Sums of products of bfloat16 numbers may travel as such; float16 ones may be too large or small for theirs.
    narrow = tiles.narrow and recurrent_kernel.dtype == torch.bfloat16
    dtype = _sent_dtype(torch.bfloat16 if narrow else torch.float32)
    messages = torch.zeros(2, teams, team, width * tiles.rows, device=device, dtype=dtype)
    with torch.cuda.device_of(grad_h):
        slstm_backward_kernel[(teams * team,)](
            grad_h.contiguous(),
            recurrent_kernel.contiguous(),
            starts,
            derivatives,
            grads.last_h.contiguous(),
            grads.last_average.contiguous(),
            grads.last_log_n.contiguous(),
            messages,
            grad_gates,
            *first,
            batch,
            length,
            teams,
            HEADS=heads,
            HEAD_DIM=head_dim,
            TEAM=team,
            TEAM_BLOCK=next_power_of_two(team),
            UNITS=tiles.units,
            ROWS=tiles.rows,
            WIDTH=width,
            HAS_STARTS=document_start is not None,
            HAS_CAP=with_cap,
            NARROW=narrow,
            WARPS=tiles.warps,
            num_warps=tiles.warps,
            num_stages=1,
            launch_cooperative_grid=team > 1,
        )
    return InputGradients(grad_gates, *first)


@operator("slstm")
def slstm_cell(inputs: CellInputs, cap: float | None, with_derivatives: bool) -> CellResults:
    """As launch_forward, with the tiles of the shape."""
    tiles = default_tiles(inputs.gates_x.shape[-1], inputs.recurrent_kernel.dtype)
    return launch_forward(tiles, inputs, cap, with_derivatives)


@slstm_cell.fake
def _(inputs: CellInputs, cap: float | None, with_derivatives: bool) -> CellResults:
    gates_x, recurrent_kernel, h = inputs.gates_x, inputs.recurrent_kernel, inputs.h
    batch, length, _, heads, head_dim = gates_x.shape
    outputs = gates_x.new_empty(batch, length, heads, head_dim)
    is_same = gates_x.dtype == recurrent_kernel.dtype
    mixed = outputs.new_empty(0) if is_same else torch.empty_like(outputs, dtype=recurrent_kernel.dtype)
    kinds = kinds_of_derivatives(cap is not None) if with_derivatives else 0
    derivatives = recurrent_kernel.new_empty(batch, length, kinds, heads, head_dim)
    return CellResults(outputs, mixed, derivatives, *(h.new_empty(h.shape) for _ in range(4)))


@operator("slstm_backward")
def slstm_backward(
    grads: OutputGradients,
    recurrent_kernel: Tensor,
    document_start: Tensor | None,
    derivatives: Tensor,
    gates_dtype: torch.dtype,
    with_cap: bool,
) -> InputGradients:
    """As launch_backward, with the tiles of the shape."""
    tiles = default_tiles(grads.h.shape[-1], recurrent_kernel.dtype)
    return launch_backward(tiles, grads, recurrent_kernel, document_start, derivatives, gates_dtype, with_cap)


@slstm_backward.fake
def _(
    grads: OutputGradients,
    recurrent_kernel: Tensor,
    document_start: Tensor | None,
    derivatives: Tensor,
    gates_dtype: torch.dtype,
    with_cap: bool,
) -> InputGradients:
    batch, length, heads, head_dim = grads.h.shape
    grad_gates = grads.h.new_empty(batch, length, 4, heads, head_dim, dtype=gates_dtype)
    like = grads.last_h
    return InputGradients(grad_gates, like.new_empty(like.shape), like.new_empty(like.shape))


def _keep(ctx: Any, arguments: list[Any], results: CellResults) -> None:
    inputs, cap, _ = arguments
    mixed = results.mixed if results.mixed.numel() else results.outputs
    ctx.save_for_backward(*inputs[1:6], mixed, results.derivatives, results.last_c, results.last_n)
    ctx.gates_dtype, ctx.with_cap = inputs.gates_x.dtype, cap is not None
    ctx.mark_non_differentiable(results.mixed, results.derivatives, results.last_m)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: CellResults) -> tuple[Tensor | None, ...]:
    kernel, starts, h, c, n, mixed, derivatives, last_c, last_n = ctx.saved_tensors
    with autocast_disabled(kernel):
        zeros = torch.zeros_like(last_c)
        grad_last_h, grad_last_c, grad_last_n = (
            zeros if x is None else x for x in (grads.last_h, grads.last_c, grads.last_n)
        )
        grad_outputs = torch.zeros_like(mixed) if grads.outputs is None else grads.outputs
        # The kernel carries y = c / n and l = m + log n: c = y n, and both are scaled by exp(l).
        of_outputs = OutputGradients(
            grad_outputs, grad_last_h, grad_last_c * last_n, grad_last_c * last_c + grad_last_n * last_n
        )
        found = slstm_backward(of_outputs, kernel, starts, derivatives, ctx.gates_dtype, ctx.with_cap)
        mixed_grads = found.gates_x.to(kernel.dtype)
        grad_kernel = grad_h = grad_c = grad_n = None
        if ctx.needs_input_grad[1]:
            grad_kernel = _kernel_gradient(h, mixed, starts, mixed_grads)
        if ctx.needs_input_grad[3]:
            grad_h = torch.einsum("bgho,higo->bhi", mixed_grads[:, 0].float(), kernel.float())
            if starts is not None:
                grad_h = grad_h.masked_fill(starts[:, 0, None, None], 0)
        is_empty = n == 0
        if ctx.needs_input_grad[4]:
            grad_c = (found.average / n).masked_fill(is_empty, 0)
        if ctx.needs_input_grad[5]:
            grad_n = ((found.log_n - found.average * c / n) / n).masked_fill(is_empty, 0)
    # In the order of CellInputs.
    return found.gates_x, grad_kernel, None, grad_h, grad_c, grad_n


def _kernel_gradient(h: Tensor, mixed: Tensor, starts: Tensor | None, grad_gates: Tensor) -> Tensor:
    """[NH, DH, 4, DH], summed over all tokens, one matrix product for each gate and head."""
    before = torch.cat([h.to(mixed.dtype)[:, None], mixed[:, :-1]], dim=1)
    if starts is not None:
        before = before.masked_fill(starts[:, :, None, None], 0)
    before = before.flatten(0, 1).permute(1, 2, 0)
    gates = [torch.bmm(before, grad_gates[:, :, gate].flatten(0, 1).transpose(0, 1)) for gate in range(4)]
    return torch.stack(gates, dim=2)


slstm_cell.differentiate(_keep, _differentiate)
