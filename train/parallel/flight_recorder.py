"""What NCCL was asked to do, as torch records it while a run goes on: its flight recorder.

Gloo has none here: whoever waits in it can be told from the frames of its thread.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

# Of the variables that set how many collectives are kept, the one that torch looks at first and its older name.
_BUFFER_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_KEPT_COLLECTIVES = "2000"


def record_collectives(variables: MutableMapping[str, str]) -> list[str]:
    """Let torch record the collectives of NCCL, unless the environment `variables` say how. Before any process group.

    Returns the names of the variables that were set.
    """
    if any(name in variables for name in _BUFFER_VARIABLES):
        return []
    variables.update(dict.fromkeys(_BUFFER_VARIABLES, _KEPT_COLLECTIVES))
    return list(_BUFFER_VARIABLES)


def recorded_collectives() -> bytes | None:
    """The recorder's contents, pickled, as torch's own program `torchfrtrace` reads them; None without NCCL.

    It needs nothing of the GPU, but holds Python's global lock: where the driver hangs, so does every thread.
    """
    # torch has no public name for it.
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    found: bytes | None = None if dump is None else dump(includeCollectives=True, includeStackTraces=True)
    return found
