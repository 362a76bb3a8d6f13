"""The fused loss, head norm and mLSTM step compiled for sm_90, without spills. B batch, S sequence, NH heads."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.kernels.compile_gate import assert_lean, compile_launches  # noqa: E402

B, S, NH = 1, 70, 2
DTYPES = ["float32", "bfloat16", "float16"]


def loss_rows(vocabulary, dtype, cap):
    from kernels.cross_entropy import rows

    # As the loss lays its buffer out.
    logits = torch.empty(4, -(-vocabulary // 16) * 16, dtype=getattr(torch, dtype))[:, :vocabulary]
    targets = torch.zeros(4, dtype=torch.int64)
    losses, log_sums, scales = (torch.empty(4) for _ in range(3))
    rows.store_losses(logits, targets, losses, log_sums, cap, 1e-4)
    rows.store_gradients(logits, targets, log_sums, scales, cap, 1e-4)
    rows.store_losses_and_gradients(logits, targets, losses, cap, 1e-4)


def head_norms(head_dim, dtype):
    from kernels.head_norm import fused

    h = torch.empty(B, S, NH, head_dim, dtype=getattr(torch, dtype))
    gate_preact, weight = h.flatten(2), torch.empty(NH * head_dim)
    for gate in (None, gate_preact):
        fused.launch_forward(h, gate, weight, 1e-6)
        fused.launch_backward(gate_preact, h, gate, weight, 1e-6)


def step(key_dim, value_dim, dtype, gate, normaliser):
    from kernels.mlstm import MLSTMState, step_fused
    from kernels.mlstm.inputs import CellSettings, StepInputs
    from kernels.mlstm.step import DecodingState

    q, k = (torch.empty(B, NH, key_dim, dtype=getattr(torch, dtype)) for _ in range(2))
    v = torch.empty(B, NH, value_dim, dtype=getattr(torch, dtype))
    i, f = (torch.empty(B, NH) for _ in range(2))
    empty = MLSTMState.empty(B, NH, key_dim, value_dim, device=q.device, dtype=torch.float32)
    state = DecodingState.of(empty)
    inputs = StepInputs(q, k, v, i, f, state.C, state.n, state.m)
    step_fused.mlstm_step.function(inputs, CellSettings(gate, normaliser))


@pytest.mark.slow
def test_loss():
    calls = [
        (loss_rows, {"vocabulary": v, "dtype": t, "cap": c})
        for v in (50304, 50257)
        for t in DTYPES
        for c in (None, 30.0)
    ]
    for (_, arguments), kernels in zip(calls, compile_launches(calls), strict=True):
        assert [kernel.name for kernel in kernels] == [
            "losses_kernel",
            "gradients_kernel",
            "losses_and_gradients_kernel",
        ]
        for kernel in kernels:
            # ptxas puts one register away in one of them, far below its limit.
            assert_lean(kernel, stack_bytes=8)
            # Four blocks of 8 warps a multiprocessor, half of that where the vocabulary is no multiple of 16.
            assert kernel.registers <= (64 if arguments["vocabulary"] % 16 == 0 else 128)


@pytest.mark.slow
def test_head_norm():
    calls = [
        (head_norms, {"head_dim": d, "dtype": t}) for d in (48, 192, 512, 1024, 4096) for t in ("float32", "bfloat16")
    ]
    for kernels in compile_launches(calls):
        assert [k.name for k in kernels] == ["forward_kernel", "backward_kernel"] * 2
        for kernel in kernels:
            assert_lean(kernel)


@pytest.mark.slow
def test_step():
    shapes = [(64, 128), (192, 384), (256, 512), (512, 1024), (2048, 64)]
    calls = [
        (step, {"key_dim": key, "value_dim": value, "dtype": "bfloat16", "gate": gate, "normaliser": normaliser})
        for key, value in shapes
        for gate, normaliser in [("exp", True), ("sigmoid", False)]
    ]
    for (_, arguments), (kernel,) in zip(calls, compile_launches(calls), strict=True):
        assert_lean(kernel)
        assert kernel.registers <= (128 if arguments["key_dim"] <= 512 else 255)
