"""Which ranks hold other bits than they should: what several ranks hold alike is compared by digest.

A rank makes a digest of each tensor on its device, eight bytes, and only those travel. Below ZeRO-3 all ranks of a
stage hold all of its weights, and the last stage of a pipeline has a copy of a tied one; under ZeRO-3 the small
parameters that DeepSpeed keeps whole are compared. Where weights have a copy in a lower precision, each rank also
compares its own part with the fp32 weights that it was made from. That shows which rank is wrong, also of two, and
finds what no other rank has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.parallel.engine import Engine
from train.parallel.fragments import Fragment
from train.parallel.mesh import Mesh

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 1024


@dataclass(frozen=True)
class Deviation:
    """What one rank holds otherwise."""

    rank: int
    # Parameters, in the order of the model.
    names: tuple[str, ...]
    # False where as many ranks say one thing as another, and this one may be right.
    is_certain: bool


def digest(tensor: Tensor) -> Tensor:
    """int64 scalar that follows from the bits of `tensor`, on its device. One bit that differs always shows.

    Words are added up in columns, which have different odd weights, modulo 2^64: several bits that differ cancel only
    where they lie in one column or are made to.
    """
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    whole = words.numel() // _COLUMNS * _COLUMNS
    sums = words[:whole].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
    rest = words[whole:]
    sums[: rest.numel()] += rest
    weights = torch.arange(1, 2 * _COLUMNS, 2, dtype=torch.int64, device=tensor.device)
    return (sums * weights).sum()


def deviating_weights(engine: Engine, names: Sequence[str]) -> list[Deviation]:
    """The ranks whose weights are not those that they should be; equal on all ranks. Collective.

    `names`: of all parameters of the model.
    """
    suspects = {f.name: torch.stack([digest(f.compute), _expected(f)]) for f in engine.fragments if _is_copy(f)}
    return _deviations(engine.mesh, names, engine.whole_weights(), suspects)


def deviating_gradients(engine: Engine, names: Sequence[str]) -> list[Deviation]:
    """The same of the reduced gradients that this rank holds whole. Between the last backward pass and the step."""
    gradients = {f.name: g for f in engine.fragments if _is_whole(f) and (g := f.gradient()) is not None}
    return _deviations(engine.mesh, names, gradients, {})


def _is_copy(fragment: Fragment) -> bool:
    return fragment.compute.data_ptr() != fragment.master.data_ptr()


def _is_whole(fragment: Fragment) -> bool:
    return fragment.numel == torch.Size(fragment.shape).numel()


def _expected(fragment: Fragment) -> Tensor:
    return digest(fragment.master.to(fragment.compute.dtype))


def _deviations(
    mesh: Mesh, names: Sequence[str], replicated: Mapping[str, Tensor], suspects: Mapping[str, Tensor]
) -> list[Deviation]:
    """`suspects`: parameter -> two digests [2] of this rank's part of it that should be equal."""
    zero = torch.zeros((), dtype=torch.int64, device=mesh.device)
    equal = torch.zeros(2, dtype=torch.int64, device=mesh.device)
    digests = torch.stack([digest(replicated[name]) if name in replicated else zero for name in names])
    held = torch.tensor([name in replicated for name in names], dtype=torch.int64, device=mesh.device)
    own = torch.stack([suspects.get(name, equal) for name in names])
    mine = torch.stack([digests, held, (own[:, 0] != own[:, 1]).to(torch.int64)])
    gathered, wait = mesh.start_gather(mine, group="world")
    wait()
    # [ranks, 3, names]: the one wait for the device.
    of_ranks = gathered.tolist()
    wrong: dict[int, list[str]] = {}
    unclear: dict[int, list[str]] = {}
    for position, name in enumerate(names):
        for_certain, perhaps = _judge([tuple(row[position] for row in of_rank) for of_rank in of_ranks])
        for rank in for_certain:
            wrong.setdefault(rank, []).append(name)
        for rank in perhaps:
            unclear.setdefault(rank, []).append(name)
    return [
        Deviation(rank, tuple(found[rank]), found is wrong)
        for rank in sorted({*wrong, *unclear})
        for found in (wrong, unclear)
        if rank in found
    ]


def _judge(of_ranks: Sequence[tuple[int, ...]]) -> tuple[list[int], list[int]]:
    """The ranks that are wrong about one parameter, and those of which some must be. `of_ranks`: (digest, whether it
    is held, whether the rank's own part is wrong) of each rank."""
    own = [rank for rank, (_, _, is_wrong) in enumerate(of_ranks) if is_wrong]
    holders = {rank: value for rank, (value, is_held, _) in enumerate(of_ranks) if is_held}
    counts = Counter(value for rank, value in holders.items() if rank not in own)
    if len(counts) <= 1:
        return own, []
    (usual, most), (_, second) = counts.most_common(2)
    others = [rank for rank in holders if rank not in own]
    if most == second:
        return own, others
    return sorted([*own, *(rank for rank in others if holders[rank] != usual)]), []
