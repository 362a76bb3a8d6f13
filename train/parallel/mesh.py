"""The processes of a run as pipeline stages x data replicas x sequence ranks, and every collective among them.

Sequence ranks are neighbours, then replicas, then stages:

    rank = ((pipeline * data_size) + data) * sequence_size + sequence

Groups of ranks have names, and each collective says in which group it happens:

    world               all ranks
    data_and_sequence   the ranks of one stage: they hold the same weights and add up their gradients
    sequence            the ranks that hold slices of the same samples
    pipeline            the stages that the same slices pass through
"""

from __future__ import annotations

import contextlib
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.board import Board
from train.parallel.flight_recorder import record_collectives
from train.watch.phase_clock import PhaseClock
from train.watch.whereabouts import FORWARD, Whereabouts

GroupName = Literal["world", "data_and_sequence", "sequence", "pipeline"]
GROUP_NAMES: tuple[GroupName, ...] = typing.get_args(GroupName)
Value = TypeVar("Value")
# Waits for what was begun; on a GPU the current stream does.
Wait = Callable[[], None]


@dataclass(frozen=True)
class MeshShape:
    """How many stages, replicas and sequence ranks there are: the arithmetic of a mesh, without any process."""

    pipeline: int = 1
    data: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        assert min(self.pipeline, self.data, self.sequence) >= 1, self

    @classmethod
    def of_world(cls, world_size: int, pipeline: int = 1, sequence: int = 1) -> MeshShape:
        """The shape of `world_size` processes. Raises ValueError when they do not divide into replicas."""
        if world_size % (pipeline * sequence):
            raise ValueError(
                f"{world_size} processes do not divide into replicas of {pipeline} pipeline stages x {sequence} "
                f"sequence ranks; start a multiple of {pipeline * sequence}"
            )
        return cls(pipeline, world_size // (pipeline * sequence), sequence)

    @property
    def size(self) -> int:
        """Processes of the whole mesh."""
        return math.prod((self.pipeline, self.data, self.sequence))

    def rank(self, pipeline: int, data: int, sequence: int) -> int:
        """The rank at these coordinates."""
        return (pipeline * self.data + data) * self.sequence + sequence

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, sequence) of a rank."""
        stage_and_replica, sequence = divmod(rank, self.sequence)
        pipeline, data = divmod(stage_and_replica, self.data)
        return pipeline, data, sequence

    def members(self, group: GroupName) -> list[list[int]]:
        """The ranks of each group of this name. Every rank is in exactly one of them."""
        stages, replicas, slices = range(self.pipeline), range(self.data), range(self.sequence)
        match group:
            case "world":
                return [list(range(self.size))]
            case "data_and_sequence":
                return [[self.rank(p, d, s) for d in replicas for s in slices] for p in stages]
            case "sequence":
                return [[self.rank(p, d, s) for s in slices] for p in stages for d in replicas]
            case "pipeline":
                return [[self.rank(p, d, s) for p in stages] for d in replicas for s in slices]


class Mesh:
    """This process among those of the run.

    `pipeline`, `data` and `sequence` are its coordinates; `shape` has the sizes. Every collective is called by all
    ranks of the group that it names, in the same order. In a group of one it does nothing.
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int = 0,
        device: torch.device | None = None,
        timeout: timedelta | None = None,
    ):
        """Makes the process groups: every rank calls it at the same time. A mesh of one process needs none.

        `timeout`: after which a collective of these groups that does not finish ends the process. `world` has that
        of the process group, which must have been initialised.
        """
        self.shape = shape
        self.rank = rank
        self.device = device or torch.device("cpu")
        self.pipeline, self.data, self.sequence = shape.coordinates(rank)
        self.whereabouts = Whereabouts(PhaseClock(device, on_device=(FORWARD,)))
        # Of the methods that move tensors between slices and stages, since the start: what this rank received from
        # others, in bytes, and how many times it took part.
        self.received_bytes: dict[GroupName, int] = dict.fromkeys(GROUP_NAMES, 0)
        self.exchanges: dict[GroupName, int] = dict.fromkeys(GROUP_NAMES, 0)
        self._members: dict[GroupName, list[int]] = {}
        self._groups: dict[GroupName, dist.ProcessGroup | None] = {}
        for name in GROUP_NAMES:
            self._members[name] = next(ranks for ranks in shape.members(name) if rank in ranks)
            self._groups[name] = self._make_group(name, timeout)
        self._owns_process_group = False
        self._variables_before: dict[str, str | None] = {}

    def _make_group(self, name: GroupName, timeout: timedelta | None) -> dist.ProcessGroup | None:
        """The process group of this rank. Ranks make also those groups that they are not in: torch asks for it."""
        mine = None
        for ranks in self.shape.members(name):
            if len(ranks) == 1:
                continue
            # What is the whole world needs no second communicator, with buffers of its own.
            whole = len(ranks) == self.shape.size
            group = dist.group.WORLD if whole else dist.new_group(ranks, timeout=timeout)
            if self.rank in ranks:
                mine = group
        return mine

    @property
    def size(self) -> int:
        """Processes of the run."""
        return self.shape.size

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what one rank writes."""
        return self.rank == 0

    def size_of(self, group: GroupName) -> int:
        """Ranks of this rank's group of that name."""
        return len(self._members[group])

    def sum(self, tensor: Tensor, *, group: GroupName) -> Tensor:
        """Replace `tensor` by its sum over the group, in place; returns it."""
        if self.size_of(group) > 1:
            with self._waiting():
                dist.all_reduce(tensor, group=self._groups[group])
        return tensor

    def maximum(self, tensor: Tensor, *, group: GroupName) -> Tensor:
        """Replace each element of `tensor` by the largest of the group's, in place; returns it."""
        if self.size_of(group) > 1:
            with self._waiting():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._groups[group])
        return tensor

    def gather_objects(self, value: Value, *, group: GroupName) -> list[Value]:
        """What every rank of the group passed, in the order of ranks. Values are pickled."""
        if self.size_of(group) == 1:
            return [value]
        found: list[typing.Any] = [None] * self.size_of(group)
        with self._waiting():
            dist.all_gather_object(found, value, group=self._groups[group])
        return found

    def broadcast_object(self, value: Value, *, group: GroupName) -> Value:
        """What the first rank of the group passed. Values are pickled."""
        if self.size_of(group) == 1:
            return value
        found: list[typing.Any] = [value]
        with self._waiting():
            dist.broadcast_object_list(found, src=self._members[group][0], group=self._groups[group])
        return found[0]

    def place_in(self, group: GroupName) -> int:
        """The position of this rank among those of its group."""
        return self._members[group].index(self.rank)

    def start_gather(self, tensor: Tensor, *, group: GroupName) -> tuple[Tensor, Wait]:
        """Begin to collect every rank's `tensor`, all alike in shape: [ranks, *shape], filled once waited for."""
        size = self.size_of(group)
        gathered = tensor.new_empty(size, *tensor.shape)
        if size == 1:
            gathered[0] = tensor
            return gathered, _nothing
        self._count(group, gathered[1:])
        tensor = tensor.contiguous()
        # In one dimension: gloo wants the result in the form of the parts.
        work = _all_gather(gathered.view(-1), tensor.view(-1), group=self._groups[group], async_op=True)
        return gathered, self._wait_for([work], tensor)

    def all_to_all(self, tensor: Tensor, *, group: GroupName) -> Tensor:
        """[ranks, ...] -> [ranks, ...]: element i goes to the i-th rank of the group, and one comes from it."""
        assert tensor.shape[0] == self.size_of(group), "one part for each rank"
        if self.size_of(group) == 1:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._count(group, received[1:])
        with self._waiting():
            dist.all_to_all_single(received, tensor.contiguous(), group=self._groups[group])
        return received

    def broadcast(self, tensor: Tensor, source: int, *, group: GroupName) -> Tensor:
        """Replace `tensor` by that of the rank at place `source` of the group, in place; returns it."""
        if self.size_of(group) > 1:
            self._count(group, *([] if self.place_in(group) == source else [tensor]))
            with self._waiting():
                dist.broadcast(tensor, self._members[group][source], group=self._groups[group])
        return tensor

    def start_transfers(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], *, group: GroupName) -> Wait:
        """Begin to send tensors to the ranks at these places of the group, and to receive into others.

        Of contiguous tensors. Whoever is sent to receives at the same time; ranks with neither need not call.
        """
        members, process_group = self._members[group], self._groups[group]
        self._count(group, *receives.values())
        operations = [
            dist.P2POp(dist.irecv, tensor, members[place], process_group) for place, tensor in receives.items()
        ]
        operations += [dist.P2POp(dist.isend, tensor, members[place], process_group) for place, tensor in sends.items()]
        return self._wait_for(dist.batch_isend_irecv(operations), *sends.values()) if operations else _nothing

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """What is done inside is no work of this rank's own."""
        return self.whereabouts.clock.waiting()

    def _wait_for(self, works: Sequence[dist.Work | None], *sent: Tensor) -> Wait:
        """Wait for `works`. Until then what they send stays in memory."""

        def wait() -> None:
            with self._waiting():
                for work in works:
                    if work is not None:
                        work.wait()
            del kept[:]

        kept = list(sent)
        return wait

    def _count(self, group: GroupName, *received: Tensor) -> None:
        self.exchanges[group] += 1
        self.received_bytes[group] += sum(tensor.numel() * tensor.element_size() for tensor in received)

    def barrier(self, *, group: GroupName) -> None:
        """Wait for all ranks of the group."""
        if self.size_of(group) > 1:
            with self._waiting():
                dist.barrier(group=self._groups[group])

    def open_board(self, prefix: str, patience: timedelta) -> Board | None:
        """The board of all processes; None where this one is alone, or its caller has let them meet otherwise than by
        torchrun's variables. Raises BoardError."""
        if self.size == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return None
        return Board(prefix, patience)

    def close(self) -> None:
        """Leave the process group and the environment as `join_mesh` found them. Every rank calls it."""
        if self._owns_process_group:
            dist.destroy_process_group()
            self._owns_process_group = False
        for name, value in self._variables_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._variables_before.clear()


# torch 2.13 warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _nothing() -> None:
    """There is nothing to wait for."""


def launched_processes() -> int:
    """Processes of the run that this one was started for: torchrun's variables; without a rank it is alone."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def join_mesh(timeout: timedelta, pipeline: int = 1, sequence: int = 1) -> Mesh:
    """Join the processes of the run: NCCL with one GPU a process, gloo without a GPU.

    Reads the variables that torchrun sets; without a rank the run is one process, and they are set until the mesh is
    closed, for libraries that read them. A process group that the caller has made is used and left.
    """
    before: dict[str, str | None] = {}
    alone = "RANK" not in os.environ
    if alone:
        own = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    owns = not dist.is_initialized()
    if owns:
        if device.type == "cuda" and not alone:
            before |= dict.fromkeys(record_collectives(os.environ))
        _initialise(device, timeout, alone=alone)
    mesh = Mesh(MeshShape.of_world(dist.get_world_size(), pipeline, sequence), dist.get_rank(), device, timeout)
    mesh._owns_process_group, mesh._variables_before = owns, before
    return mesh


def _initialise(device: torch.device, timeout: timedelta, alone: bool) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:
        # On a port that the system chooses: a second run beside this one gets another.
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
        return
    # A bound device lets NCCL start its communicators at once, and split later ones off.
    bound = device if backend == "nccl" and launched_processes() > 1 else None
    dist.init_process_group(backend, timeout=timeout, device_id=bound)
