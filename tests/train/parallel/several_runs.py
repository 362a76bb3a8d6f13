"""Several runs one after the other in one start of the processes, which takes longer than a small run.

main([JSON])    as one of WORLD_SIZE processes over gloo; JSON: the overrides of each run
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

from conf import compose
from train.config import RunConfig
from train.parallel.mesh import join_mesh
from train.run import train


def main(arguments: list[str]) -> int:
    """Train each; the exit code of the first that fails, or 0."""
    # The runs find a process group, and leave it for the next.
    mesh = join_mesh(timedelta(seconds=300))
    for overrides in json.loads(arguments[0]):
        code = train(compose(RunConfig, "train", overrides))
        if code:
            return code
    mesh.close()
    return 0


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))
