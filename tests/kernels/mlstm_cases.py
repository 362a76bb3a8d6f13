"""Inputs and comparisons that the mLSTM tests share. Axes: B batch, S sequence, NH heads, DK, DV head dimensions."""

import torch
from torch import Tensor

from kernels.mlstm import MLSTMState, reference
from kernels.mlstm.inputs import CellSettings, cell_inputs
from tests.kernels import cases


def with_public_arguments(form):
    """A form of the mLSTM, of kernels.mlstm.inputs' arguments, as a function of those of kernels.mlstm.mlstm."""

    def cell(
        q, k, v, igate_preact, fgate_preact, *, document_start=None, initial_state=None, gate="exp", normaliser=True,
        eps=1e-6, **options,
    ):  # fmt: skip
        inputs = cell_inputs(k, v, igate_preact, fgate_preact, document_start, initial_state)
        return form(q, inputs, CellSettings(gate, normaliser, eps), **options)

    return cell


mlstm_chunkwise = with_public_arguments(reference.mlstm_chunkwise)
mlstm_quadratic = with_public_arguments(reference.mlstm_quadratic)
mlstm_recurrent = with_public_arguments(reference.mlstm_recurrent)

B, S, NH, DK, DV = 2, 37, 3, 6, 5
INPUT_NAMES = ("q", "k", "v", "igate_preact", "fgate_preact")

# (gate, normaliser)
GATE_KINDS = [("exp", True), ("sigmoid", True), ("sigmoid", False)]

# Every public form, the chunkwise one also with chunks of one token, of a size that does not divide S, and of all S.
FORMS = {
    "recurrent": (mlstm_recurrent, {}),
    "quadratic": (mlstm_quadratic, {}),
    "chunkwise-1": (mlstm_chunkwise, {"chunk_size": 1}),
    "chunkwise-8": (mlstm_chunkwise, {"chunk_size": 8}),
    "chunkwise-13": (mlstm_chunkwise, {"chunk_size": 13}),
    "chunkwise-64": (mlstm_chunkwise, {"chunk_size": 64}),
}

REGIMES = ["initialisation", "random", "saturated", "strong forgetting", "huge input gate", "all equal"]

# First tokens of documents, for S = 37 and chunks of 8 tokens.
DOCUMENTS = {
    "none": None,
    "first token": [0],
    "second token": [1],
    "last token": [36],
    "chunk edges": [7, 8, 16, 25],
    "several in one chunk": [9, 10, 11, 14],
    "everywhere": list(range(37)),
    "first and last": [0, 1, 35, 36],
}


def gates(regime: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Pre-activations of input and forget gate, [..., NH] each."""
    i, f = torch.randn(*shape), torch.randn(*shape)
    if regime == "initialisation":
        return i * 0.01 - 10, f * 0.01 + torch.linspace(3, 6, shape[-1])
    if regime == "random":
        return 2 * i, 2 * f
    if regime == "saturated":
        return 15 * i.sign(), 15 * f.sign()
    if regime == "strong forgetting":
        return i, f - 15
    if regime == "huge input gate":
        i[:, shape[1] // 3] = 50
        return i, f + 4
    assert regime == "all equal"
    return torch.zeros(shape), torch.zeros(shape)


def make_inputs(regime: str = "random", dtype: torch.dtype = torch.float64, *, length: int = S, seed: int = 0) -> list:
    """[q, k, v, igate_preact, fgate_preact], leaves that require a gradient."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, length, NH, DK), torch.randn(B, length, NH, DK), torch.randn(B, length, NH, DV)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, *gates(regime, B, length, NH))]


def make_state(gate: str = "exp", dtype: torch.dtype = torch.float64, *, seed: int = 1) -> MLSTMState:
    """A state whose C and n require a gradient."""
    torch.manual_seed(seed)
    m = torch.randn(B, NH) if gate == "exp" else torch.zeros(B, NH)
    parts = [torch.randn(B, NH, DK, DV).to(dtype).requires_grad_(), torch.randn(B, NH, DK).to(dtype).requires_grad_()]
    return MLSTMState(*parts, m.to(dtype))


def starts_at(positions: list[int] | None, length: int = S) -> Tensor | None:
    """[B, S] bool, as tests.kernels.cases.starts_at."""
    return cases.starts_at(positions, B, length)


def weights_of_loss(*tensors: Tensor) -> list[Tensor]:
    """Fixed random cotangents, so that every form is asked for the same gradient."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in tensors]


def outputs_and_gradients(form, inputs, state=None, **kwargs) -> dict[str, Tensor]:
    """Run a form; its output, final state and the gradients of a loss over all of them, by name."""
    h, final = form(*inputs, initial_state=state, return_state=True, **kwargs)
    results = {"h": h, "C": final.C, "n": final.n}
    wanted = dict(zip(INPUT_NAMES, inputs, strict=True))
    if state is not None:
        wanted |= {"initial C": state.C, "initial n": state.n}
    gradients = torch.autograd.grad(
        list(results.values()),
        list(wanted.values()),
        weights_of_loss(*results.values()),
        # An initial state that a document start drops may not be part of the graph.
        materialize_grads=True,
    )
    return results | {"m": final.m} | {f"d {name}": x for name, x in zip(wanted, gradients, strict=True)}
