"""`troubled_train.py` with torch's recorder of gloo's collectives in the place of NCCL's: they have one format."""

from __future__ import annotations

import os
import sys

os.environ["TORCH_FR_BUFFER_SIZE"] = "200"

import torch

from tests.train.watch.troubled_train import main
from train.__main__ import end_process

torch._C._distributed_c10d._dump_nccl_trace = torch._C._distributed_c10d._dump_fr_trace
if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
