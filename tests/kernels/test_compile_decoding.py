"""The products of a decoding step of the 7B compiled for sm_90: without spills, within the shared memory they claim."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from kernels.decoding.tiles import MOST_SHARED_BYTES  # noqa: E402
from tests.kernels.compile_gate import compile_launches  # noqa: E402


def step(rows, cap):
    from kernels.decoding import MixerWeights, NormWeights, fused

    width, keys, heads, inner, vocabulary = 4096, 2048, 8, 10944, 50304

    def matrix(outputs, inputs=width):
        return torch.empty(outputs, inputs, dtype=torch.bfloat16)

    norm, bias = NormWeights(torch.empty(width, dtype=torch.bfloat16), 1e-6), torch.empty(heads, dtype=torch.bfloat16)
    weights = MixerWeights(
        matrix(keys), matrix(keys), matrix(width), matrix(width), matrix(heads), bias, matrix(heads), bias
    )
    x = matrix(rows)
    fused.mixer_inputs.function(x, norm, weights, cap)
    fused.mixer_output.function(x.unflatten(1, (heads, -1)), x, norm, matrix(width), x)
    fused.swiglu.function(x, norm, matrix(inner), matrix(inner))
    fused.added_product.function(matrix(rows, inner), matrix(width, inner), x)
    fused.logits.function(x, norm, matrix(vocabulary), cap)


@pytest.mark.slow
def test_a_step_of_one_row_and_of_several():
    calls = [(step, {"rows": rows, "cap": cap}) for rows, cap in ((1, 15.0), (1, None), (8, 15.0), (64, None))]
    for (_, arguments), kernels in zip(calls, compile_launches(calls), strict=True):
        assert {"projections_kernel", "swiglu_kernel", "product_kernel"} <= {kernel.name for kernel in kernels}
        for kernel in kernels:
            assert kernel.stack_bytes == 0, (arguments, kernel)
            assert kernel.shared_bytes <= MOST_SHARED_BYTES, (arguments, kernel)
            # Several rows are multiplied by tensor cores, from loads that run ahead.
            if arguments["rows"] > 1 and kernel.name in ("projections_kernel", "swiglu_kernel", "product_kernel"):
                assert kernel.wgmma + kernel.mma > 0 and kernel.asynchronous_copies > 0, (arguments, kernel)
