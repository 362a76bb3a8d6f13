"""The mLSTM step, by its reference, and what it refuses. Axes: B batch, NH heads, DK, DV head dimensions."""

import pytest
import torch

from kernels.mlstm import MLSTMState
from kernels.mlstm.step import DecodingState, mlstm_step
from tests.kernels.cases import assert_close
from tests.kernels.mlstm_cases import GATE_KINDS, make_inputs, make_state, mlstm_recurrent


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_the_recurrent_form(gate, normaliser, dtype):
    inputs = [x.detach() for x in make_inputs(dtype=dtype, length=9)]
    start = make_state(gate, dtype)
    kind = {"gate": gate, "normaliser": normaliser}
    expected, last = mlstm_recurrent(*inputs, initial_state=start, return_state=True, **kind)
    state = DecodingState.of(start)
    places = [part.data_ptr() for part in vars(state).values()]
    h = torch.stack([mlstm_step(*(x[:, t] for x in inputs), state, **kind) for t in range(9)], dim=1)
    assert h.dtype == dtype and [part.data_ptr() for part in vars(state).values()] == places
    actual = {"h": h, **vars(state.as_mlstm_state())}
    assert_close(actual, {"h": expected, **vars(last)}, 1e-12 if dtype == torch.float64 else 1e-6)


def test_a_decoding_state_is_a_contiguous_copy():
    state = make_state()
    turned = MLSTMState(state.C.detach().transpose(-1, -2).contiguous().transpose(-1, -2), state.n, state.m)
    copy = DecodingState.of(turned)
    assert torch.equal(copy.C, state.C) and copy.C.is_contiguous() and not copy.C.requires_grad
    assert torch.equal(copy.as_mlstm_state().n, state.n) and torch.equal(copy.as_mlstm_state().m, state.m)
    copy.n.zero_()
    assert state.n.any()


def test_mistakes_are_named():
    q, k, v, i, f = (x[:, 0].detach() for x in make_inputs())
    state = DecodingState.of(make_state())
    for change, message in [
        ({"q": q[:, None]}, r"q must be \[B, NH, DK\], got \(2, 1, 3, 6\)"),
        ({"k": k[..., 1:]}, r"k must have shape \(2, 1, 3, 6\) .* got \(2, 1, 3, 5\)"),
        ({"state": DecodingState(state.C, state.n[:1], state.m)}, r"initial_state.n must have shape \(2, 3, 6\)"),
        ({"gate": "tanh"}, "gate must be one of exp, sigmoid, not 'tanh'"),
        ({"normaliser": False}, "gate=exp needs the normaliser"),
        ({"backend": "cuda"}, "unknown mLSTM step backend 'cuda'"),
        ({"backend": "triton"}, "mLSTM step backend 'triton' needs a CUDA device"),
    ]:
        arguments = {"q": q, "k": k, "v": v, "igate_preact": i, "fgate_preact": f, "state": state} | change
        with pytest.raises(ValueError, match=message):
            mlstm_step(**arguments)
