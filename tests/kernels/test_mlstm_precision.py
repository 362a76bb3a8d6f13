"""Precision, extreme values, errors and statistics of the mLSTM."""

import pytest
import torch

from kernels.mlstm import MLSTMState, mlstm, mlstm_state, mlstm_statistics
from tests.kernels.cases import assert_close
from tests.kernels.mlstm_cases import (
    FORMS,
    GATE_KINDS,
    REGIMES,
    B,
    S,
    make_inputs,
    make_state,
    mlstm_quadratic,
    outputs_and_gradients,
    starts_at,
)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_close_to_float64(form, regime):
    function, options = FORMS[form]
    single = make_inputs(regime, torch.float32)
    double = [x.detach().double().requires_grad_() for x in single]
    starts = starts_at([5, 20])
    expected = outputs_and_gradients(mlstm_quadratic, double, document_start=starts)
    actual = outputs_and_gradients(function, single, document_start=starts, **options)
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_close({name: x.double() for name, x in actual.items()}, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_are_computed_in_float32(form):
    function, options = FORMS[form]
    half = make_inputs("random", torch.bfloat16)
    single = [x.detach().float().requires_grad_() for x in half]
    h, state = function(*half, return_state=True, **options)
    expected, expected_state = function(*single, return_state=True, **options)
    assert torch.equal(h, expected.bfloat16())
    for name in ("C", "n", "m"):
        assert torch.equal(getattr(state, name), getattr(expected_state, name))
    gradients = torch.autograd.grad(h.sum(), half)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), single), strict=True):
        assert torch.equal(gradient, reference.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_float32_gates_beside_bfloat16_values_keep_their_precision(form):
    function, options = FORMS[form]
    q, k, v, i, f = make_inputs("random", torch.float32)
    values = [x.detach().bfloat16() for x in (q, k, v)]
    _, state = function(*values, i, f, return_state=True, **options)
    _, expected = mlstm_quadratic(*(x.double() for x in (*values, i, f)), return_state=True)
    assert_close({"C": state.C.double(), "m": state.m.double()}, {"C": expected.C, "m": expected.m}, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    function, options = FORMS[form]
    inputs, state = make_inputs("random", torch.float32), make_state(dtype=torch.float32)

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (args[0][0, 0] @ args[1][0, 0].T).dtype == torch.bfloat16
            return function(*args, **kwargs)

    expected = outputs_and_gradients(function, inputs, state, **options)
    actual = outputs_and_gradients(under_autocast, inputs, state, **options)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("igate", [-torch.inf, -1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("fgate", [-torch.inf, -1e4, -100.0, 0.0, 1e4, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_stay_finite(form, fgate, igate, gate, normaliser):
    function, options = FORMS[form]
    q, k, v, i, f = make_inputs("random", torch.float32, length=20)
    i, f = torch.full_like(i, igate), torch.full_like(f, fgate)
    inputs = [q, k, v, i.requires_grad_(), f.requires_grad_()]
    kind = {"gate": gate, "normaliser": normaliser, "document_start": starts_at([0, 9], 20)}
    results = outputs_and_gradients(function, inputs, make_state(gate, torch.float32), **kind, **options)
    for name, value in results.items():
        assert value.isfinite().all(), name
    if igate == -torch.inf:
        assert torch.equal(results["h"][0], torch.zeros_like(results["h"][0]))


@pytest.mark.parametrize("form", FORMS)
def test_one_extreme_gate_among_ordinary_ones(form):
    function, options = FORMS[form]
    inputs = make_inputs("random", torch.float64)
    with torch.no_grad():
        inputs[3][:, 5], inputs[3][:, 12], inputs[4][:, 20] = 300.0, -torch.inf, -torch.inf
    expected = outputs_and_gradients(mlstm_quadratic, inputs)
    assert all(value.isfinite().all() for value in expected.values())
    assert_close(outputs_and_gradients(function, inputs, **options), expected, 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_zero_queries_and_keys_give_zeros(form):
    function, options = FORMS[form]
    q, k, v, i, f = make_inputs("huge input gate", torch.float32)
    inputs = [torch.zeros_like(q).requires_grad_(), torch.zeros_like(k).requires_grad_(), v, i, f]
    results = outputs_and_gradients(function, inputs, **options)
    assert torch.equal(results["h"], torch.zeros_like(results["h"]))
    assert all(value.isfinite().all() for value in results.values())


def test_two_runs_are_bitwise_equal():
    inputs, state = make_inputs(dtype=torch.float32), make_state(dtype=torch.float32)
    first = outputs_and_gradients(mlstm, inputs, state, reference_chunk_size=8)
    second = outputs_and_gradients(mlstm, inputs, state, reference_chunk_size=8)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_state_can_be_detached_and_converted():
    state = make_state()
    detached = state.detach()
    assert not detached.C.requires_grad
    assert torch.equal(detached.C, state.C)
    assert state.to("cpu", torch.float32).n.dtype == torch.float32
    assert state.to("meta").C.device.type == "meta"


def test_shapes_can_be_inferred_on_the_meta_device():
    h, state = mlstm(*(x.detach().to("meta") for x in make_inputs()), return_state=True, reference_chunk_size=8)
    assert h.shape == (B, S, 3, 5)
    assert state.C.shape == (B, 3, 6, 5)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_statistics_describe_the_first_tokens_of_the_first_sequence(gate):
    q, k, v, i, f = make_inputs("random", torch.float32)
    starts, tokens = starts_at([4, 9]), 12
    state, stabilisers, at_floor = None, [], []
    for t in range(tokens):
        step = [x[:1, t : t + 1] for x in (q, k, v, i, f)]
        _, state = mlstm(*step, document_start=starts[:1, t : t + 1], initial_state=state, return_state=True, gate=gate)
        query_normaliser = (state.n * q[:1, t] / q.shape[-1] ** 0.5).sum(-1)
        stabilisers.append(state.m)
        at_floor.append(query_normaliser.abs() <= torch.exp(-state.m))
    statistics = mlstm_statistics(q, k, i, f, document_start=starts, max_tokens=tokens, gate=gate)
    assert all(value.shape == () and value.dtype == torch.float32 for value in statistics.values())
    assert not any(value.requires_grad for value in statistics.values())
    fraction = torch.stack(at_floor).float().mean()
    assert 0 < fraction <= 1
    assert torch.isclose(statistics["stabiliser_min"], torch.stack(stabilisers).min(), atol=1e-6)
    assert torch.isclose(statistics["stabiliser_max"], torch.stack(stabilisers).max(), atol=1e-6)
    assert torch.isclose(statistics["normaliser_floor_fraction"], fraction)


def test_statistics_take_bfloat16_under_autocast():
    q, k, _, i, f = make_inputs("initialisation", torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = mlstm_statistics(q, k, i, f)
    # With an input gate of exp(-10) nothing outgrows the floor.
    assert statistics["normaliser_floor_fraction"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "tanh"}, "gate must be one of exp, sigmoid, not 'tanh'"),
        ({"normaliser": False}, "gate=exp needs the normaliser: set normaliser=true, or gate=sigmoid"),
        ({"reference_chunk_size": 0}, "reference_chunk_size must be at least 1, not 0"),
        ({"backend": "cuda"}, "unknown mLSTM backend 'cuda'; use one of auto, reference"),
        ({"document_start": torch.zeros(B, S + 1, dtype=torch.bool)}, r"document_start must have shape \(2, 37\)"),
        ({"document_start": torch.zeros(B, S)}, "document_start must be bool, got torch.float32"),
        ({"k": torch.zeros(B, S, 3, 7)}, r"k must have shape \(2, 37, 3, 6\) .* got \(2, 37, 3, 7\)"),
        ({"v": torch.zeros(B, S, 4, 5)}, r"v must have shape \(2, 37, 3, 5\)"),
        ({"igate_preact": torch.zeros(B, S)}, r"igate_preact must have shape \(2, 37, 3\)"),
        ({"fgate_preact": torch.zeros(B, S, 1)}, r"fgate_preact must have shape \(2, 37, 3\)"),
        ({"q": torch.zeros(B, 0, 3, 6)}, r"q must be \[B, S, NH, DK\] with at least one token"),
        (
            {"initial_state": MLSTMState(torch.zeros(B, 3, 5, 6), torch.zeros(B, 3, 6), torch.zeros(B, 3))},
            r"initial_state.C must have shape \(2, 3, 6, 5\)",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(zip(("q", "k", "v", "igate_preact", "fgate_preact"), make_inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        mlstm(**(arguments | change))


def test_the_state_alone_names_the_keys_and_no_query():
    _, k, v, i, f = make_inputs()
    with pytest.raises(ValueError, match=r"^k must be \[B, S, NH, DK\] with at least one token, got \(2, 0, 3, 6\)"):
        mlstm_state(k[:, :0], v, i, f)
    with pytest.raises(ValueError, match=r"^v must have shape \(2, 37, 3, 5\) to go with k \(2, 37, 3, 6\)"):
        mlstm_state(k, v[:, 1:], i, f)
