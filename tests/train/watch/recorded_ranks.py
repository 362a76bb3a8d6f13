"""Two ranks over gloo of which one is late, and what their flight recorders say of it: on standard output, by rank 0.

torch records gloo's collectives in the format of NCCL's, but notices late that an operation is done.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from train.watch.collectives import as_json, describe_collectives, from_json, group_records

os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
dist.init_process_group("gloo")
rank = dist.get_rank()
pair = dist.new_group([0, 1], group_desc="pair")
for _ in range(3):
    dist.all_reduce(torch.ones(4, 2))
dist.all_reduce(torch.ones(()), group=pair)
dist.barrier()
late = None if rank else dist.all_reduce(torch.ones(5), async_op=True)
# Until torch has noticed that the four before are done: three sums and a barrier.
while (records := group_records(torch._C._distributed_c10d._dump_fr_trace()))[0].finished < 4:
    time.sleep(0.01)
told = as_json(records)
store = dist.distributed_c10d._get_default_store()
store.set(f"told/{rank}", told)
if rank == 0:
    both = {other: from_json(store.get(f"told/{other}").decode()) for other in (0, 1)}
    for of_ranks in (both, {0: both[0]}):
        print(describe_collectives(of_ranks, 2))
else:
    store.get("told/0")
    dist.all_reduce(torch.ones(5))
if late is not None:
    late.wait()
dist.barrier()
