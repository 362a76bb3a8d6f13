"""Whether a run fits the memory of its GPU and of its machine, as far as the plan can tell before the start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from train.config import RunConfig
from train.plan import Plan, gib

# What a run may take, as a multiple of the plan's sum: temporaries of single operations, gradients of activations,
# fragmentation. On an H200 models of 0.4B and 1.4B allocated 0.99 and 1.00 times their plan at the peak, without what
# the allocator keeps unused. On a CPU the C library keeps much of what was freed: plans of 1.6 and 15.3 GiB took 1.4
# and 1.5 times that beside PROCESS_BYTES.
GPU_FACTOR = 1.1
CPU_FACTOR = 1.5
# Of a process without a model: Python, torch and the other libraries.
PROCESS_BYTES = 0.5 * 2**30


@dataclass(frozen=True)
class Room:
    """Bytes that are free for a run on this machine."""

    host_bytes: float
    # Of one rank's GPU; None: ranks compute on the CPU.
    device_bytes: float | None
    # Ranks on this machine.
    ranks: int
    # Whether a control group limits the host's memory, as for a container or a job.
    is_limited: bool = False

    @classmethod
    def here(cls, world_size: int) -> Room:
        """As it is now. `world_size`: processes of the run; torchrun says how many of them are on this machine."""
        host, limit = float(psutil.virtual_memory().available), control_group_bytes()
        return cls(
            host_bytes=min(host, limit),
            device_bytes=float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None,
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            is_limited=limit < host,
        )


def memory_warnings(config: RunConfig, plan: Plan, room: Room) -> list[str]:
    """What may not fit, with both numbers and the keys to change; empty where all of it should fit."""
    needed = plan.rank_bytes + plan.graph_bytes
    warnings = []
    if room.device_bytes is not None:
        warnings += _warning(needed, needed * GPU_FACTOR, room.device_bytes, "a rank needs", "free on its GPU")
        # A checkpoint is copied to the host before it is written.
        needed = plan.checkpoint_bytes / plan.world_size + plan.host_state_bytes
        factor = 1.0
    else:
        factor = CPU_FACTOR
    who = "the run's process needs" if room.ranks == 1 else f"{room.ranks} ranks need"
    where = "left below the memory limit of this container or job" if room.is_limited else "available on this machine"
    low, high = (room.ranks * (needed * times + PROCESS_BYTES) for times in (1.0, factor))
    on_host = _warning(low, high, room.host_bytes, who, where)
    if not warnings and not on_host:
        return []
    shares_activations = bool(warnings) or room.device_bytes is None
    return [f"{line}. {ways_to_need_less(config, plan, shares_activations)}" for line in (*warnings, *on_host)]


def _warning(low: float, high: float, room: float, who: str, where: str) -> list[str]:
    if high <= room:
        return []
    verdict = "does not fit" if low > room else "may not fit"
    return [
        f"warning    this run {verdict} into memory: by the plan {who} {gib(low)}, up to about {gib(high)} at "
        f"the peak; {gib(room)} are {where}"
    ]


def ways_to_need_less(config: RunConfig, plan: Plan, computes_there: bool) -> str:
    """Which keys lower what a run needs. `computes_there`: of the memory that holds activations."""
    ways = []
    parallel = config.parallel
    if computes_there and plan.micro_batch_size > 1:
        ways.append(f"lower training.micro_batch_size ({plan.micro_batch_size})")
    if computes_there and parallel.activation_checkpointing != "block":
        ways.append(f"set parallel.activation_checkpointing=block ({parallel.activation_checkpointing})")
    if computes_there and plan.time_chunk is None and parallel.sequence == 1:
        ways.append(f"train less than {plan.sequence_length} tokens at a time with training.time_chunk")
    if computes_there and parallel.zero_stage < 3 and plan.world_size > 1:
        ways.append(f"shard more with parallel=zero3 (zero{parallel.zero_stage})")
    ways.append("use more or larger machines" if plan.world_size > 1 else "use more processes with parallel=zero3")
    ways.append("train a smaller model")
    return f"To need less: {', or '.join(ways)}"


def control_group_bytes(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """What this process's control groups still allow, of version 1 or 2; infinite where they set no limit."""
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return float("inf")
    left = float("inf")
    for _, controllers, path in lines:
        if controllers == "":
            base, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        # A container sees its own group as the root, whatever path the host gives it.
        groups = [group for group in (folder, *folder.parents) if group == base or base in group.parents]
        left = min(left, *(_left_in(group, limit, usage) for group in groups))
    return left


def _left_in(group: Path, limit: str, usage: str) -> float:
    try:
        total = float((group / limit).read_text().replace("max", "inf"))
        used = float((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    # Pages of files are given back when they are needed.
    reclaimable = float(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return max(0.0, total - used + reclaimable)
