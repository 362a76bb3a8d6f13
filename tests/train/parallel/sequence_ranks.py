"""What every rank of a sequence does in tests/train/parallel/test_sequence.py; one start of the ranks serves all cases.

    main([file])    as one of WORLD_SIZE processes over gloo; the first one writes {case: {number: value}} to the file

Axes: B batch, S tokens of the whole sequence, P ranks, NH heads, C channels, K kernel size.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.mlstm import MLSTMState
from model.layers.mlstm_cell import Cell, CellInputs, entering_state, run_cell
from model.projections import CausalConv
from model.recomputation import ACTIVATION_CHECKPOINTING
from tests.kernels.mlstm_cases import mlstm_quadratic
from tests.model.conftest import CONFIGS, model_in_play
from train.parallel.mesh import Mesh, join_mesh
from train.parallel.sequence import DistributedSequence
from train.parallel.state_exchange import EXCHANGES

B, NH, DK, DV = 2, 3, 4, 5
# Tokens of a slice, and of a chunk of the cell.
SLICE, CHUNK = 7, 3

# Means of the pre-activations of input and forget gate, and their spread: the regimes of arXiv 2503.13427 at its start
# and later, memory that the input gate fills at once, and memory that lasts for a few tokens.
REGIMES = {
    "typical": (0.0, 3.0, 1.5),
    "small input gate": (-10.0, 4.5, 0.5),
    "large input gate": (6.0, 3.0, 2.0),
    "strong forgetting": (0.0, -8.0, 3.0),
}
GATES = {"exp": ("exp", True), "sigmoid": ("sigmoid", True), "unnormalised": ("sigmoid", False)}
# For `ranks` slices of `length` tokens, the tokens at which documents start.
DOCUMENTS: dict[str, Callable[[int, int], list[int] | None]] = {
    "none": lambda ranks, length: None,
    "no start": lambda ranks, length: [],
    # At a border, inside of a slice, several in one; none in every third.
    "unequal": lambda ranks, length: [
        start for r in range(ranks) for start in ([0], [2, 3, 5], [])[r % 3] for start in [r * length + start]
    ],
    # One document start after another in the second slice, none in the others.
    "everywhere in one": lambda ranks, length: list(range(length, 2 * length)),
    "everywhere": lambda ranks, length: list(range(ranks * length)),
}
CELL_CASES = [
    *itertools.product(EXCHANGES, REGIMES, ["exp"], DOCUMENTS),
    *itertools.product(EXCHANGES, ["typical"], ["sigmoid", "unnormalised"], ["unequal"]),
]

Numbers = dict[str, float]


def cell_name(exchange: str, regime: str, gate: str, documents: str) -> str:
    return f"cell, {exchange}, {regime}, {gate}, {documents}"


def document_starts(positions: list[int] | None, tokens: int) -> Tensor | None:
    """[B, S]; the last row is one token later, so that rows differ."""
    if positions is None:
        return None
    starts = torch.zeros(B, tokens, dtype=torch.bool)
    for row in range(B):
        starts[row, [place + row for place in positions if place + row < tokens]] = True
    return starts


class Comparison:
    """The largest difference of any rank, relative to the norm of the whole tensor, by name."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.errors: Numbers = {}

    def add(self, name: str, ours: Tensor, whole: Tensor, axis: int | None = 1) -> None:
        """`ours` is this rank's slice along `axis` of `whole`, or with None all of it."""
        expected = whole if axis is None else whole.chunk(self.mesh.shape.sequence, axis)[self.mesh.sequence]
        assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
        error = ((ours - expected).norm() / whole.norm().clamp_min(1e-30)).item()
        self.errors[name] = max(self.errors.get(name, 0.0), error if error == error else 1e30)

    def add_sum(self, name: str, ours: Tensor | None, whole: Tensor | None) -> None:
        """Over the ranks, `ours` add up to `whole`."""
        assert ours is not None and whole is not None, name
        self.add(name, self.mesh.sum(ours.clone(), group="sequence"), whole, None)


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that gradients are asked for."""
    return [x.detach().clone().requires_grad_() for x in tensors]


@dataclasses.dataclass
class WholeCell:
    """The cell in one process: inputs in the order of CellInputs, the state before, loss weights, what comes out."""

    tokens: list[Tensor]
    starts: Tensor | None
    before: list[Tensor]
    m_before: Tensor
    weights: list[Tensor]
    h: Tensor
    behind: MLSTMState
    gradients: tuple[Tensor, ...]


@functools.cache
def whole_cell(ranks: int, regime: str, gate: str, documents: str) -> WholeCell:
    """Every token against every other, in another form than the one that the ranks use."""
    tokens = ranks * SLICE
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    igate_mean, fgate_mean, spread = REGIMES[regime]
    gate_kind, normaliser = GATES[gate]
    whole = [random(B, tokens, NH, DK), random(B, tokens, NH, DK), random(B, tokens, NH, DV)]
    whole = leaves([*whole, *(spread * random(B, tokens, NH) + mean for mean in (igate_mean, fgate_mean))])
    starts = document_starts(DOCUMENTS[documents](ranks, SLICE), tokens)
    before = leaves([random(B, NH, DK, DV), random(B, NH, DK)])
    m_before = random(B, NH) if gate_kind == "exp" else torch.zeros(B, NH, dtype=torch.float64)
    weights = [random(B, tokens, NH, DV), random(B, NH, DK, DV), random(B, NH, DK)]
    h, behind = mlstm_quadratic(
        *whole,
        document_start=starts,
        initial_state=MLSTMState(*before, m_before),
        return_state=True,
        gate=gate_kind,
        normaliser=normaliser,
    )
    loss = (h * weights[0]).sum() + (behind.C * weights[1]).sum() + (behind.n * weights[2]).sum()
    gradients = torch.autograd.grad(loss, [*whole, *before])
    return WholeCell(whole, starts, before, m_before, weights, h, behind, gradients)


@functools.cache
def sequence_of(mesh: Mesh, exchange: str = "auto") -> DistributedSequence:
    return DistributedSequence(mesh, exchange)


def run_cell_case(mesh: Mesh, exchange: str, regime: str, gate: str, documents: str) -> Numbers:
    """The cell from an initial state: outputs, final state, gradients of all inputs and of the initial state."""
    ranks, sequence = mesh.shape.sequence, sequence_of(mesh, exchange)
    whole = whole_cell(ranks, regime, gate, documents)
    gate_kind, normaliser = GATES[gate]
    own, own_initial = leaves([x.chunk(ranks, 1)[mesh.sequence] for x in whole.tokens]), leaves(whole.before)
    start = None if whole.starts is None else whole.starts.chunk(ranks, 1)[mesh.sequence]
    cell = Cell(NH, DK, DV, gate_kind, normaliser, 1e-6, "reference", CHUNK)
    inputs = CellInputs(*own, start)
    received = mesh.received_bytes["sequence"]
    before = MLSTMState(*own_initial, whole.m_before)
    entering = entering_state(cell, inputs, before, sequence)
    entering.state()
    received_forward = mesh.received_bytes["sequence"] - received
    h, state = run_cell(cell, inputs, entering, before, True, sequence)
    state = sequence.outgoing(state)
    # Every rank has the same state at the end, and a share of its part of the loss.
    weights = whole.weights
    loss = (h * weights[0].chunk(ranks, 1)[mesh.sequence]).sum()
    loss = loss + ((state.C * weights[1]).sum() + (state.n * weights[2]).sum()) / ranks
    received = mesh.received_bytes["sequence"]
    ours = torch.autograd.grad(loss, [*own, *own_initial])
    comparison = Comparison(mesh)
    comparison.add("h", h, whole.h)
    for name in ("C", "n", "m"):
        comparison.add(name, getattr(state, name), getattr(whole.behind, name), None)
    for name, mine, all_of_it in zip(("q", "k", "v", "igate", "fgate"), ours, whole.gradients, strict=False):
        comparison.add(f"gradient of {name}", mine, all_of_it)
    for name, mine, all_of_it in zip(("C", "n"), ours[5:], whole.gradients[5:], strict=True):
        comparison.add_sum(f"gradient of the initial {name}", mine, all_of_it)
    way = EXCHANGES[exchange]
    rows, width = B * NH, DK * DV + DK + 2
    by_formula = 8 * way.received_elements(mesh.sequence, ranks, rows, width)
    comparison.errors["bytes received, less formula"] = abs(received_forward - by_formula)
    by_formula = 8 * way.received_elements(ranks - 1 - mesh.sequence, ranks, rows, width)
    # The state at the end adds up its gradients by other means, which are not counted.
    difference = mesh.received_bytes["sequence"] - received - by_formula
    comparison.errors["bytes received backwards, less formula"] = abs(difference)
    return comparison.errors


def run_convolution_case(mesh: Mesh, documents: str, kernel_size: int) -> Numbers:
    """A convolution over time: outputs, the inputs at the end, gradients of inputs, parameters and earlier inputs."""
    ranks, tokens, channels = mesh.shape.sequence, mesh.shape.sequence * SLICE, 3
    generator = torch.Generator().manual_seed(3)
    conv = CausalConv(channels, kernel_size).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, weights = (torch.randn(B, tokens, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    tail, tail_weights = (
        torch.randn(B, kernel_size - 1, channels, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    starts = document_starts(DOCUMENTS[documents](ranks, SLICE), tokens)
    x.requires_grad_()
    tail.requires_grad_()
    parameters = list(conv.parameters())
    y, behind = conv(x, starts, tail)
    theirs = torch.autograd.grad((y * weights).sum() + (behind * tail_weights).sum(), [x, tail, *parameters])

    sequence = sequence_of(mesh)
    own = x.detach().chunk(ranks, 1)[mesh.sequence].clone().requires_grad_()
    start = None if starts is None else starts.chunk(ranks, 1)[mesh.sequence]
    received = mesh.received_bytes["sequence"]
    halo = sequence.halo(own, conv.history, start, tail)
    received = mesh.received_bytes["sequence"] - received
    ours_y, own_behind = conv(own, start, halo)
    end = sequence.outgoing(own_behind)
    loss = (ours_y * weights.chunk(ranks, 1)[mesh.sequence]).sum() + (end * tail_weights).sum() / ranks
    ours = torch.autograd.grad(loss, [own, tail, *parameters])
    comparison = Comparison(mesh)
    comparison.add("y", ours_y, y)
    comparison.add("inputs at the end", end, behind, None)
    comparison.add("gradient of x", ours[0], theirs[0])
    for name, mine, all_of_it in zip(("earlier inputs", "weight", "bias"), ours[1:], theirs[1:], strict=True):
        comparison.add_sum(f"gradient of {name}", mine, all_of_it)
    by_formula = 8 * B * conv.history * channels if mesh.sequence else 0
    comparison.errors["bytes received, less formula"] = abs(received - by_formula)
    return comparison.errors


def run_heads_case(mesh: Mesh, heads: int) -> Numbers:
    """The exchange of heads for time and back, with a function between them that depends on the time and the head."""
    ranks = mesh.shape.sequence
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(B, ranks * 2, heads, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    shared = max(1, ranks // heads)
    factor = torch.randn(ranks * 2, heads * shared, 3, generator=generator, dtype=torch.float64)
    # With fewer heads than ranks each is computed by several, with a factor of its own.
    whole = x.repeat_interleave(shared, 2).cumsum(1) * factor
    weights = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    (theirs,) = torch.autograd.grad((whole * weights).sum(), x)

    sequence = sequence_of(mesh)
    own = x.detach().chunk(ranks, 1)[mesh.sequence].clone().requires_grad_()
    by_heads = sequence.time_to_heads(own)
    result = sequence.heads_to_time(by_heads.cumsum(1) * sequence.own_heads(factor, 1))
    (ours,) = torch.autograd.grad((result * weights.chunk(ranks, 1)[mesh.sequence]).sum(), own)
    comparison = Comparison(mesh)
    comparison.add("result", result, whole)
    comparison.add("gradient", ours, theirs)
    return comparison.errors


def model_cases(ranks: int) -> Iterator[tuple[str, str]]:
    """Models whose heads divide among the ranks, each with one way of recomputation or all."""
    small = {"mlstm": "unit", "mlstm_sigmoid_unnormalised": "none", "neurips_mlstm": "block"}
    if ranks in (2, 4):
        small["attention"] = "unit"
    yield from small.items()
    if ranks == 2:
        yield "mlstm_and_slstm", "none"
        yield from itertools.product(["hybrid", "neurips_mlstm_and_slstm"], ACTIVATION_CHECKPOINTING)


def run_model_case(mesh: Mesh, name: str, mode: str) -> Numbers:
    """A whole model over two windows, one continuing the other: losses, gradients, and how often it exchanged."""
    from tests.model.test_sequence import make_windows, run_windows

    ranks = mesh.shape.sequence
    model, windows = model_in_play(CONFIGS[name]), make_windows(2)
    expected, _ = run_windows(model, windows)
    weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view_as(expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)

    own = copy.deepcopy(model)
    own.sequence, own.activation_checkpointing = sequence_of(mesh), mode
    slices = [{key: value.chunk(ranks, dim=1)[mesh.sequence] for key, value in window.items()} for window in windows]
    exchanges = mesh.exchanges["sequence"]
    losses, _ = run_windows(own, slices)
    forward = mesh.exchanges["sequence"] - exchanges
    own_weights = torch.cat([part.chunk(ranks, 1)[mesh.sequence] for part in weights.chunk(2, 1)], 1)
    ours = torch.autograd.grad((losses * own_weights).sum(), list(own.parameters()))
    comparison = Comparison(mesh)
    comparison.errors["exchanges forward"] = forward
    comparison.errors["exchanges backward"] = mesh.exchanges["sequence"] - exchanges - forward
    own_expected = torch.cat([part.chunk(ranks, 1)[mesh.sequence] for part in expected.chunk(2, 1)], 1)
    comparison.add("losses", losses, own_expected, None)
    for parameter, mine, whole in zip(names, ours, theirs, strict=True):
        comparison.add_sum(f"gradient of {parameter}", mine, whole)
    return comparison.errors


def cases(ranks: int) -> Iterator[tuple[str, Callable[..., Numbers], tuple[Any, ...]]]:
    """Name, function and arguments of every case for this number of ranks."""
    for case in CELL_CASES:
        yield cell_name(*case), run_cell_case, case
    for documents in DOCUMENTS:
        yield f"convolution, {documents}", run_convolution_case, (documents, 4)
    yield "convolution as long as a slice", run_convolution_case, ("unequal", SLICE + 1)
    for heads in sorted({1, ranks, 2 * ranks} | ({ranks // 2} if ranks % 2 == 0 else set())):
        yield f"{heads} heads", run_heads_case, (heads,)
    for name, mode in model_cases(ranks):
        yield f"model {name}, {mode}", run_model_case, (name, mode)


def main(arguments: list[str]) -> int:
    """Run all cases."""
    torch.set_num_threads(1)
    mesh = join_mesh(timedelta(seconds=120), sequence=int(os.environ["WORLD_SIZE"]))
    found = {name: function(mesh, *case) for name, function, case in cases(mesh.size)}
    ranks = mesh.gather_objects(found, group="sequence")
    if mesh.is_main:
        largest = {
            case: {name: max(rank[case][name] for rank in ranks) for name in numbers} for case, numbers in found.items()
        }
        Path(arguments[0]).write_text(json.dumps(largest), encoding="utf-8")
    mesh.close()
    return 0


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))
