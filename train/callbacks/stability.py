"""Stability statistics of every layer at an interval.

A monitored step waits for the device only at its end: layers record 0-d tensors (`model.statistics`), norms are
added up on the device, two all-reduces combine the ranks, and one copy brings everything to the host.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.accounting import parameter_shapes
from model.statistics import Statistics, memory_tokens, recording
from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Rollback

if TYPE_CHECKING:
    from train.parallel.fragments import Fragment
    from train.parallel.mesh import Mesh
    from train.trainer import Trainer


class Stability(Callback):
    """Every `logging.monitor_interval` steps, dispatches `on_statistics` and `on_profiles` to all callbacks."""

    def __init__(self) -> None:
        self._recording: contextlib.ExitStack | None = None
        self._statistics: Statistics | None = None
        self._pending: _Combined | None = None

    def on_step_start(self, trainer: Trainer) -> None:
        interval = trainer.config.logging.monitor_interval
        # Statistics carry the number of completed steps, as all of the run's records do.
        if interval and (trainer.step + 1) % interval == 0:
            self._recording = contextlib.ExitStack()
            self._statistics = self._recording.enter_context(recording())

    def on_gradients_ready(self, trainer: Trainer) -> None:
        if self._statistics is None:
            return
        mesh = trainer.mesh
        slices = mesh.size_of("sequence")
        shared = slices > 1
        recorded = self._statistics.values((lambda x: mesh.sum(x, group="sequence") / slices) if shared else None)
        profiles = self._statistics.profiles()
        self._stop_recording()
        # Every rank must list the same groups, also those of which it holds no part.
        model = trainer.config.model
        groups = {name: layer_group(name, model.n_blocks) for name in parameter_shapes(model)}
        squares = _squared_norms(trainer.engine.fragments, groups, trainer.device)
        self._pending = _combine_over_ranks(recorded, squares, profiles, trainer.mesh)

    def on_step_end(self, trainer: Trainer) -> Decision:
        if self._pending is not None:
            values, profiles = self._pending.to_host()
            self._pending = None
            values |= forgetting(profiles, trainer.config.training.sequence_length)
            trainer.dispatch("on_statistics", values)
            trainer.dispatch("on_profiles", with_memory(profiles))
        return CONTINUE

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        # Of the step that was given up.
        self._pending = None

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        self._stop_recording()

    def _stop_recording(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = self._statistics = None


class _Combined:
    """Values of all ranks on their way to the host, in one tensor: a number of each name, then of each profile its
    numbers."""

    def __init__(self, names: list[str], sizes: dict[str, int], values: Tensor):
        self._names = names
        self._sizes = sizes
        self._values = values

    def to_host(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """(values by their names, profiles by theirs)"""
        numbers = self._values.tolist()
        rest = iter(numbers[len(self._names) :])
        profiles = {name: list(itertools.islice(rest, size)) for name, size in self._sizes.items()}
        return dict(zip(self._names, numbers[: len(self._names)], strict=True)), profiles


def with_memory(profiles: dict[str, list[float]]) -> dict[str, list[float]]:
    """The profiles, with the memory length of each head in tokens in place of its forget rate."""
    found = {}
    for name, values in profiles.items():
        layer, _, last = name.rpartition(".")
        if last == "forget_rate":
            found[f"{layer}.memory_tokens"] = [memory_tokens(rate) for rate in values]
        else:
            found[name] = values
    return found


def forgetting(profiles: dict[str, list[float]], sequence_length: int) -> dict[str, float]:
    """Of each layer with forget gates: the median of its heads' memory lengths in tokens, and two shares of its heads.

    A head never forgets that keeps half of what it wrote over `sequence_length` tokens, at its mean rate. It always
    forgets if one token leaves less than 1/e.
    """
    found = {}
    for name, values in profiles.items():
        layer, _, last = name.rpartition(".")
        rates = [rate for rate in values if not math.isnan(rate)]
        if last == "forget_rate" and rates:
            found[f"{layer}.memory_tokens_median"] = memory_tokens(statistics.median(rates))
            found[f"{layer}.never_forgets"] = sum(rate * sequence_length <= math.log(2) for rate in rates) / len(rates)
            found[f"{layer}.always_forgets"] = sum(rate > 1 for rate in rates) / len(rates)
    return found


def layer_group(name: str, n_blocks: int) -> str:
    """The part of a model of `n_blocks` blocks that the parameter `name` is reported under.

    Blocks have the names of the layers' own statistics: "blocks.3.mixer.q_proj.weight" comes under "blocks.03.mixer",
    the scale of a norm inside that block under "blocks.03.norms".
    """
    first, *rest = name.split(".")
    if first != "blocks":
        return first
    digits = max(2, len(str(n_blocks - 1)))
    return f"blocks.{int(rest[0]):0{digits}d}.{'norms' if 'norm' in name else rest[1]}"


def _squared_norms(fragments: Sequence[Fragment], groups: dict[str, str], device: torch.device) -> dict[str, Tensor]:
    """Squared L2 norms of this rank's part of every group's gradient and weights: statistic -> 0-d fp32 tensor.

    `groups`: the group of every parameter by its name.
    """
    index = {group: position for position, group in enumerate(dict.fromkeys(groups.values()))}
    squares: dict[str, Tensor] = {}
    for kind in ("gradient", "parameter"):
        tensors, positions = [], []
        for fragment in fragments:
            tensor = fragment.gradient() if kind == "gradient" else fragment.master
            if fragment.owned and tensor is not None:
                tensors.append(tensor)
                positions.append(index[groups[fragment.name]])
        total = torch.zeros(len(index), dtype=torch.float32, device=device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
            total.index_add_(0, torch.tensor(positions, device=device), norms.square())
        squares |= {f"{group}.{kind}_norm": total[position] for group, position in index.items()}
    return squares


def _combine_over_ranks(
    recorded: dict[str, tuple[str, Tensor]],
    squared_norms: dict[str, Tensor],
    profiles: dict[str, Tensor],
    mesh: Mesh,
) -> _Combined:
    """Combine all values over ranks: means averaged, squares added up, extremes taken (minima as negative maxima).

    What is measured at the beginning of a sequence only the rank with its first slice has recorded, and each stage of a
    pipeline has recorded its own layers. An element of a profile is the mean of the ranks that measured it.
    """
    reductions = {name: reduction for name, (reduction, _) in recorded.items()}
    sizes = {name: len(values) for name, values in profiles.items()}
    if mesh.size_of("sequence") > 1 or mesh.size_of("pipeline") > 1:
        of_ranks = mesh.gather_objects((reductions, sizes), group="world")
        reductions = {name: reduction for of_rank, _ in of_ranks for name, reduction in of_rank.items()}
        sizes = {name: size for _, of_rank in of_ranks for name, size in of_rank.items()}
    zero = torch.zeros((), device=mesh.device)
    nothing = zero - math.inf
    means, maxima, minima = ([n for n, of_name in reductions.items() if of_name == r] for r in ("mean", "max", "min"))
    elements = torch.cat(
        [profiles[name] if name in profiles else zero.new_full((size,), torch.nan) for name, size in sizes.items()]
        or [zero.new_empty(0)]
    )
    scalars = torch.stack(
        [
            *(recorded[name][1] if name in recorded else zero for name in means),
            *squared_norms.values(),
            *(zero + (name in recorded) for name in means),
        ]
    )
    extremes = torch.stack(
        [
            *(recorded[name][1] if name in recorded else nothing for name in maxima),
            *(-recorded[name][1] if name in recorded else nothing for name in minima),
            zero,
        ]
    )
    added = torch.cat([scalars, elements.nan_to_num(0.0), (~elements.isnan()).float()])
    mesh.sum(added, group="world")
    mesh.maximum(extremes, group="world")
    parts = [len(means) + len(squared_norms), len(means), len(elements), len(elements)]
    added, counts, sums, measured = added.split(parts)
    averages = added[: len(means)] / counts
    norms = added[len(means) :].sqrt()
    highest, lowest = extremes[: len(maxima)], -extremes[len(maxima) : len(maxima) + len(minima)]
    return _Combined(
        [*means, *squared_norms, *maxima, *minima],
        sizes,
        torch.cat([averages, norms, highest, lowest, sums / measured]),
    )
