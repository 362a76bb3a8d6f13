"""The sLSTM's Triton kernels compile for a Hopper GPU with the divisions of the work that it would use.

Their time is that of one step, so no step may spill, and all matrix products belong on the tensor cores.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from kernels.integers import next_power_of_two  # noqa: E402
from kernels.slstm.triton_op import CellInputs, OutputGradients, launch_backward, launch_forward  # noqa: E402
from kernels.slstm.triton_tiles import MAX_HEAD_DIM, Tiles, default_tiles  # noqa: E402
from tests.kernels.compile_gate import assert_lean, compile_launches  # noqa: E402

B, S, NH = 2, 3, 4
# With a soft cap on float32 gates, where a program has the most to keep.
MOST = {"gates": "float32", "cap": 15.0, "starts": True}
CASES = [(head_dim, {}) for head_dim in (48, 64, 96, 128, 192, 256, 384, 512)]
CASES += [(head_dim, MOST) for head_dim in (64, 192, 256, 384, 512)]
CASES += [(head_dim, {"weights": "float32", "gates": "float32"}) for head_dim in (64, 128, 256)]

# Bytes of local memory of a thread of the forward and of the backward kernel where these are not 0, by the width in
# units and the dtype of the weights. The weights fill most of the registers there; what only the start and the end of a
# sequence need makes room for them.
SPILLS = {(512, "bfloat16"): (72, 0), (256, "float32"): (72, 24)}


def launch_both(head_dim, weights="bfloat16", gates="bfloat16", cap=None, starts=False):
    weights, gates = getattr(torch, weights), getattr(torch, gates)
    tiles = default_tiles(head_dim, weights)
    gates_x = torch.empty(B, S, 4, NH, head_dim, dtype=gates)
    kernel = torch.empty(NH, head_dim, 4, head_dim, dtype=weights)
    state = [torch.zeros(B, NH, head_dim) for _ in range(4)]
    document_start = torch.zeros(B, S, dtype=torch.bool) if starts else None
    inputs = CellInputs(gates_x, kernel, document_start, *state)
    results = launch_forward(tiles, inputs, cap, True)
    grads = OutputGradients(results.outputs, *state[:3])
    launch_backward(tiles, grads, kernel, document_start, results.derivatives, gates, cap is not None)


@pytest.mark.slow
def test_compile_for_hopper_without_spilling_in_a_step():
    calls = [(launch_both, {"head_dim": head_dim} | kind) for head_dim, kind in CASES]
    for (head_dim, kind), kernels in zip(CASES, compile_launches(calls), strict=True):
        assert [kernel.name for kernel in kernels] == ["slstm_forward_kernel", "slstm_backward_kernel"]
        bounds = SPILLS.get((next_power_of_two(head_dim), kind.get("weights", "bfloat16")), (0, 0))
        for kernel, bound in zip(kernels, bounds, strict=True):
            assert_lean(kernel, stack_bytes=bound, tensor_cores=True)
            assert kernel.mma == 0 and kernel.spills_in_loop == 0, (head_dim, kind, kernel)


@pytest.mark.parametrize("dtype", MAX_HEAD_DIM)
def test_teams_fit_a_hopper_gpu(dtype):
    for head_dim in range(1, MAX_HEAD_DIM[dtype] + 1):
        tiles = default_tiles(head_dim, dtype)
        assert tiles.team(head_dim) <= 132 * tiles.resident
        assert tiles.team(head_dim) * tiles.units >= head_dim
        assert tiles.width(head_dim) >= tiles.team(head_dim) * tiles.units
    assert Tiles(units=16, rows=16).team(17) == 2
