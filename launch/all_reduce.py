"""All processes of a job meet and add up a tensor: whether they can, and how fast. `srun python -m launch.all_reduce`

The batch script starts it before the run, so that a cable or a node that does not work is known in a minute.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch

from conf.slurm_variables import become_rank, node_name
from train.parallel.mesh import Mesh, join_mesh

REPETITIONS = 5
TIMEOUT = timedelta(seconds=120)


def bandwidth(mesh: Mesh, mib: int) -> float:
    """GiB/s that each process sends and receives while all add up `mib` MiB, as NCCL's tests count them."""
    tensor = torch.ones(mib * 2**18, device=mesh.device)
    mesh.sum(tensor, group="world")
    if (total := float(tensor[-1])) != mesh.size:
        raise ArithmeticError(f"{mesh.size} ones add up to {total}")
    begun = time.perf_counter()
    for _ in range(REPETITIONS):
        mesh.sum(tensor, group="world")
    # Also waits for the GPU.
    float(tensor[-1])
    seconds = (time.perf_counter() - begun) / REPETITIONS
    return mib / 2**10 / seconds * 2 * (mesh.size - 1) / mesh.size


def main(arguments: list[str]) -> int:
    become_rank()
    mesh = join_mesh(TIMEOUT)
    reached, wanted = bandwidth(mesh, int(arguments[0])), float(arguments[1])
    slowest = min(mesh.gather_objects(reached, group="world"))
    if mesh.is_main:
        print(f"{mesh.size} processes add up {arguments[0]} MiB at {slowest:.2f} GiB/s", flush=True)
    if slowest < wanted:
        where = node_name() or "this machine"
        print(
            f"rank {mesh.rank} on {where}: {reached:.2f} GiB/s, {slowest:.2f} on the slowest; "
            f"launch.preflight.all_reduce_gib_per_second={wanted:g}",
            file=sys.stderr,
            flush=True,
        )
    mesh.close()
    return int(slowest < wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
