"""The sLSTM loop with a hand-written backward pass: few operations a step, and no autograd graph over time.

Autograd spends most of a step on book-keeping: each token makes tiny tensors. Here the forward loop writes into
buffers, and the backward loop does only what truly depends on the next token; all else is done for all tokens at once.

Axes: S sequence, NH heads, B batch, DH dimension of a head; gates i, f, z, o in this order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import autocast_disabled
from kernels.slstm.inputs import final_state, prepare
from kernels.slstm.state import SLSTMState

# The backward pass prepares this many steps at a time, so that what it prepares stays in the cache.
STEPS_AT_ONCE = 32


def slstm_loop(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    gate_soft_cap: float | None = None,
) -> tuple[Tensor, SLSTMState | None]:
    """Equal to slstm_recurrent of kernels.slstm.reference. Arguments and result as kernels.slstm.slstm."""
    with autocast_disabled(gates_x):
        x = prepare(gates_x, recurrent_kernel, document_start, initial_state, gate_soft_cap)
        outputs, c, n, m = _Loop.apply(x.gates_x, x.recurrent_kernel, x.starts, x.h, x.c, x.n, x.m, gate_soft_cap)
        h = outputs.permute(2, 0, 1, 3).to(gates_x.dtype)
        return h, final_state(outputs[-1], c, n, m) if return_state else None


class _Kept(NamedTuple):
    """What the forward loop keeps of each token.

    gates [S, NH, B, 4 * DH]: i and f after the soft cap, tanh(z) and sigmoid(o). weights [S, 2, NH, B, DH]: exp(i - m)
    and the weight of the old memory. memory [S + 1, 2, NH, B, DH]: c and n before the first token and after each.
    outputs [S, NH, B, DH].
    """

    gates: Tensor
    weights: Tensor
    memory: Tensor
    outputs: Tensor


class _Loop(torch.autograd.Function):
    """Fields of SLSTMInputs -> h [S, NH, B, DH] and the last c, n, m [NH, B, DH]."""

    @staticmethod
    def forward(
        ctx: Any,
        gates_x: Tensor,
        kernel: Tensor,
        starts: Tensor | None,
        h: Tensor,
        c: Tensor,
        n: Tensor,
        m: Tensor,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        length, heads, batch, width = gates_x.shape
        head_dim = width // 4
        # Holds pre-activations at first, then i and f after the soft cap, tanh(z) and sigmoid(o).
        gates = gates_x.clone()
        # exp(i - m) and the weight of the old memory.
        weights = gates.new_empty(length, 2, heads, batch, head_dim)
        # c and n before the first token and after each.
        memory = gates.new_empty(length + 1, 2, heads, batch, head_dim)
        outputs = gates.new_empty(length, heads, batch, head_dim)
        memory[0, 0], memory[0, 1] = c, n
        initial_h = h
        i_and_f = gates[..., : 2 * head_dim].unbind(0)
        # Views of all steps at once: taking them one by one would cost as much as the arithmetic.
        steps = zip(
            gates.unbind(0),
            *(gate.unbind(0) for gate in gates.split(head_dim, dim=-1)),
            weights.unbind(0),
            *(weight.unbind(0) for weight in weights.unbind(1)),
            memory[:-1].unbind(0),
            memory[1:].unbind(0),
            *(part.unbind(0) for part in memory[1:].unbind(1)),
            outputs.unbind(0),
            strict=True,
        )
        for t, (here, i, f, z, o, both, input_weight, memory_weight, old, new, c, n, output) in enumerate(steps):
            if starts is not None:
                h = h.masked_fill(starts[t], 0)
                m = m.masked_fill(starts[t], -torch.inf)
            here.baddbmm_(h, kernel)
            if cap is not None:
                i_and_f[t].div_(cap).tanh_().mul_(cap)
            kept = F.logsigmoid(f).add_(m)
            m = torch.maximum(kept, i)
            torch.sub(i, m, out=input_weight)
            torch.sub(kept, m, out=memory_weight)
            both.exp_()
            torch.mul(old, memory_weight, out=new)
            c.addcmul_(input_weight, z.tanh_())
            n.add_(input_weight)
            h = torch.div(c, n, out=output).mul_(o.sigmoid_())
        ctx.cap = cap
        ctx.save_for_backward(kernel, starts, initial_h, gates, weights, memory, outputs)
        ctx.mark_non_differentiable(m)
        return outputs, memory[-1, 0].clone(), memory[-1, 1].clone(), m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor, grad_c: Tensor, grad_n: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        kernel, starts, initial_h, *saved = ctx.saved_tensors
        with autocast_disabled(kernel):
            grad_memory = torch.stack([grad_c, grad_n])
            kept = _Kept(*saved)
            grad_gates, grad_h, (grad_c, grad_n) = _backwards(kernel, starts, kept, ctx.cap, grad_outputs, grad_memory)
            grad_kernel = None
            if ctx.needs_input_grad[1]:
                grad_kernel = _kernel_gradient(initial_h, kept.outputs, starts, grad_gates)
        return grad_gates, grad_kernel, None, grad_h, grad_c, grad_n, None, None


def _backwards(
    kernel: Tensor,
    starts: Tensor | None,
    kept: _Kept,
    cap: float | None,
    grad_outputs: Tensor,
    grad_memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations [S, NH, B, 4 * DH], the initial h and the initial (c, n)."""
    gates, weights, _, outputs = kept
    length, _, _, head_dim = outputs.shape
    grad_gates = torch.empty_like(gates)
    kernel_transposed = kernel.transpose(1, 2).contiguous()
    grad_from_c, grad_from_n = grad_memory[..., None, :]
    grad_h = grad_outputs[-1].clone()
    for first in reversed(range(0, length, STEPS_AT_ONCE)):
        block = slice(first, first + STEPS_AT_ONCE)
        by_gate = grad_gates[block].unflatten(-1, (4, head_dim))
        steps = zip(
            *(x.unbind(0) for x in _derivatives(block, kept, cap)),
            grad_gates[block].unbind(0),
            by_gate[..., :3, :].unbind(0),
            by_gate[..., :2, :].unbind(0),
            by_gate[..., 3, :].unbind(0),
            weights[block, 1].unbind(0),
            strict=True,
        )
        for t, step in reversed(list(enumerate(steps, first))):
            to_memory, from_c, from_n, from_h, here, grad_ifz, grad_if, grad_o, memory_weight = step
            grad_memory.addcmul_(to_memory, grad_h)
            torch.mul(from_c, grad_from_c, out=grad_ifz)
            grad_if.addcmul_(from_n, grad_from_n)
            torch.mul(from_h, grad_h, out=grad_o)
            grad_memory.mul_(memory_weight)
            torch.bmm(here, kernel_transposed, out=grad_h)
            if starts is not None:
                grad_h.masked_fill_(starts[t], 0)
            if t > 0:
                grad_h.add_(grad_outputs[t - 1])
    return grad_gates, grad_h, grad_memory


def _derivatives(block: slice, kept: _Kept, cap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything in the backward step that does not depend on the next token, for a block of S tokens.

    Returns:
        [S, 2, NH, B, DH]: d(h) / d(c, n).
        [S, NH, B, 3, DH]: d(c) / d(i, f, z), pre-activations.
        [S, NH, B, 2, DH]: d(n) / d(i, f).
        [S, NH, B, DH]: d(h) / d(o).
    """
    gates, weights, memory, outputs = kept
    i, f, z, o = gates[block].chunk(4, dim=-1)
    input_weight, memory_weight = weights[block].unbind(1)
    c_before, n_before = memory[:-1][block].unbind(1)
    n = memory[1:][block, 1]
    outputs = outputs[block]
    to_memory = torch.stack([o / n, -outputs / n], dim=1)
    # d(log sigmoid(f)) / df is sigmoid(-f).
    forget = memory_weight * torch.sigmoid(-f)
    into_input, into_forget = input_weight, forget
    if cap is not None:
        into_input = input_weight * (1 - (i / cap).square())
        into_forget = forget * (1 - (f / cap).square())
    into_cell = input_weight * (1 - z.square())
    to_gates_from_c = torch.stack([into_input * z, into_forget * c_before, into_cell], dim=-2)
    to_gates_from_n = torch.stack([into_input, into_forget * n_before], dim=-2)
    return to_memory, to_gates_from_c, to_gates_from_n, outputs * (1 - o)


def _kernel_gradient(initial_h: Tensor, outputs: Tensor, starts: Tensor | None, grad_gates: Tensor) -> Tensor:
    """[NH, DH, 4 * DH], summed over all tokens in one matrix product for each head."""
    h_before = torch.cat([initial_h[None], outputs[:-1]])
    if starts is not None:
        h_before = h_before.masked_fill(starts[:, None], 0)
    h_before = h_before.transpose(0, 1).flatten(1, 2)
    return h_before.transpose(1, 2) @ grad_gates.transpose(0, 1).flatten(1, 2)
