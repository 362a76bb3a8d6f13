"""What the tests of every form of the sLSTM share. B batch, S sequence, NH heads, DH dimension of a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.slstm import SLSTMState


def outputs_and_gradients(form, inputs, state=None, **kwargs) -> dict[str, Tensor]:
    """Run a form; its output, final state and the gradients of a loss over all of them, by name."""
    h, final = form(*inputs, initial_state=state, return_state=True, **kwargs)
    results = {"h": h, "final h": final.h, "c": final.c, "n": final.n}
    wanted = dict(zip(["gates_x", "recurrent_kernel"], inputs, strict=True))
    if state is not None:
        wanted |= {"initial h": state.h, "initial c": state.c, "initial n": state.n}
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), cotangents, materialize_grads=True)
    return results | {"m": final.m} | {f"d {name}": x for name, x in zip(wanted, gradients, strict=True)}


def assert_documents_are_apart(form: Callable, gates_x: Tensor, start: int, states: tuple[SLSTMState, SLSTMState]):
    """What changes in one of two documents leaves outputs and gradients of the other bitwise as they are.

    Args:
        form: (gates_x, document_start, initial_state) -> h.
        gates_x: [B, S, 4, NH, DH], a leaf.
        start: the first token of the second document.
        states: the initial state, and another: it belongs to the first document.
    """
    batch, length, _, heads, head_dim = gates_x.shape
    starts = torch.zeros(batch, length, dtype=torch.bool, device=gates_x.device)
    starts[:, start] = True
    cotangent = torch.randn(batch, length, heads, head_dim).to(gates_x)

    def run(gates_x, cotangent, state):
        h = form(gates_x, starts, state)
        return h, torch.autograd.grad(h, gates_x, cotangent)[0]

    before = run(gates_x, cotangent, states[0])
    documents = [slice(0, start), slice(start, length)]
    for changed, other in (documents, documents[::-1]):
        others = gates_x.detach().clone()
        others[:, changed] = 4 * torch.randn_like(others[:, changed])
        other_cotangent = cotangent.clone()
        other_cotangent[:, changed] *= -5
        state = states[0] if changed == documents[1] else states[1]
        after = run(others.requires_grad_(), other_cotangent, state)
        assert not torch.equal(before[0][:, changed], after[0][:, changed])
        for name, a, b in zip(["h", "d gates_x"], before, after, strict=True):
            assert torch.equal(a[:, other], b[:, other]), name
