"""One forward and backward pass of the Triton mLSTM for Nsight Compute, which shows what limits each kernel:

    ncu --profile-from-start off --clock-control none --section SpeedOfLight --section Occupancy \\
        python -m benchmarks.profile_mlstm mlstm_8x256_512_b8

Cases are those of benchmarks/cases.py.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import select
from benchmarks.peers import ours


def main() -> None:
    """Run each case once unseen, to compile it, and once under the profiler."""
    device = torch.device("cuda")
    contender = next(contender for contender in ours("triton", {}) if contender.name == "ours")
    for case in select(sys.argv[1]):
        call = contender.prepare(case, case.inputs(0, device, torch.bfloat16))
        call.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call.both()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
