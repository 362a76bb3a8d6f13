"""Is what is timed right? Relative errors against the reference in float64, on one of the input sets that are timed.

Axes: B batch, S sequence, NH heads, D dimension of a head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Case, MLSTMCase
from benchmarks.peers import MLSTM_LEAVES, Contender, Inputs
from kernels.mlstm import mlstm
from kernels.slstm import slstm

# Arguments of kernels.mlstm.mlstm. "decay" has no input gate: an input gate of exactly 1.
OPERATIONS = {
    "exp": {},
    "sigmoid": {"gate": "sigmoid"},
    "sigmoid_raw": {"gate": "sigmoid", "normaliser": False},
    "decay": {"gate": "sigmoid", "normaliser": False},
    "slstm": {},
}
# sigmoid(40) is 1 in float64.
OPEN_GATE = 40.0
# What a row of ours must meet with bfloat16 activations; ||x - reference|| / ||reference||.
LIMITS = {
    "mlstm": {"h": 4e-3, "q": 6e-3, "k": 6e-3, "v": 6e-3, "igate_preact": 6e-3, "fgate_preact": 1e-2},
    # Every step rounds h to bfloat16 before the next matrix product.
    "slstm": {"h": 1e-2, "gates_x": 2e-2, "recurrent_kernel": 2e-2},
}


def odd_case(case: Case) -> Case:
    """A short problem with the same head dims whose length no chunk divides."""
    short = {"batch": 2, "length": min(case.length, 333)}
    return replace(case, **short, heads=min(case.heads, 2)) if isinstance(case, MLSTMCase) else replace(case, **short)


def errors(contender: Contender, case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """Relative error of the output ("h") and of each gradient that the contender has.

    An mLSTM is judged on the first head of the first sequence and the last head of the last, which depend on nothing
    else; an sLSTM on all sequences of its first head, since all of them enter the gradient of the recurrent kernel.
    Where a contender leaves out the gradient through the normaliser, the upstream gradient is made orthogonal to the
    output, as behind a scale-invariant norm: then that gradient is zero.

    Returns:
        Name -> the largest error over what was judged; NaN where an output is not finite. Empty where the contender
        computes another function than ours.
    """
    if contender.operation is None:
        return {}
    inputs = case.inputs(seed, device, dtype)
    call = contender.prepare(case, inputs)
    upstream = inputs["dh"]
    if not contender.exact_gradients:
        upstream = _orthogonal_to(upstream, call.output(call.forward_only()))
        call.upstream = call.to_upstream(upstream)
    h, *grads = call.both()
    found = {"h": call.output(h).detach(), **call.gradients(grads)}
    inputs["dh"] = upstream
    pieces = [(0, 0), (case.batch - 1, case.heads - 1)] if case.kind == "mlstm" else [(slice(None), 0)]
    worst: dict[str, float] = {}
    for batch, head in pieces:
        part = {name: _piece(name, x, batch, head) for name, x in inputs.items()}
        for name, expected in _reference(contender.operation, part).items():
            if name in found:
                got = _piece(name, found[name], batch, head).double()
                error = float((got - expected).norm() / expected.norm())
                worst[name] = _larger(error, worst.get(name, 0.0))
    return worst


def beyond_limits(case: Case, found: dict[str, float]) -> list[str]:
    """What a contender of ours gets wrong, one line per tensor; empty if all is within LIMITS."""
    limits = LIMITS[case.kind]
    return [f"{name} {error:.1e} > {limits[name]:.0e}" for name, error in found.items() if not error <= limits[name]]


def _larger(a: float, b: float) -> float:
    # max() would drop a NaN that comes second.
    return a if a != a or a > b else b


def _orthogonal_to(dh: Tensor, h: Tensor) -> Tensor:
    wide, direction = dh.float(), h.float()
    share = (wide * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return (wide - share * direction).to(dh.dtype)


def _piece(name: str, x: Tensor, batch: int | slice, head: int) -> Tensor:
    """The part of a tensor that belongs to one head of one sequence, or of all of them, with all its axes."""
    if isinstance(batch, int):
        batch = slice(batch, batch + 1)
    heads = slice(head, head + 1)
    if name == "recurrent_kernel":
        return x[heads]
    return x[batch, :, :, heads] if name == "gates_x" else x[batch, :, heads]


def _reference(operation: str, part: Inputs) -> dict[str, Tensor]:
    names = ("gates_x", "recurrent_kernel") if operation == "slstm" else MLSTM_LEAVES
    leaves = [part[name].double() for name in names]
    if operation == "decay":
        leaves[3] = torch.full_like(leaves[3], OPEN_GATE)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    function = slstm if operation == "slstm" else mlstm
    h, _ = function(*leaves, **OPERATIONS[operation], backend="reference")
    gradients = torch.autograd.grad(h, leaves, part["dh"].double())
    return {"h": h.detach(), **dict(zip(names, gradients, strict=True))}
