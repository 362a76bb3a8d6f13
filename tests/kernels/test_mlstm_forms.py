"""The forms of the mLSTM are equal to each other and to the unstabilised definition, in outputs, states, gradients."""

import pytest
import torch

from kernels.mlstm import MLSTMState, mlstm
from tests.kernels.cases import assert_close
from tests.kernels.mlstm_cases import (
    DOCUMENTS,
    FORMS,
    GATE_KINDS,
    INPUT_NAMES,
    REGIMES,
    B,
    S,
    make_inputs,
    make_state,
    mlstm_chunkwise,
    mlstm_quadratic,
    mlstm_recurrent,
    outputs_and_gradients,
    starts_at,
)

OTHER_FORMS = [name for name in FORMS if name != "recurrent"]


def definition(q, k, v, igate_preact, fgate_preact, *, starts, state, gate, normaliser):
    """Straight from the paper, head by head, without stabiliser or eps: h [B, S, NH, DV], C, n unstabilised."""
    batch, length, heads, key_dim = q.shape
    h = torch.zeros_like(v)
    rows = []
    for b in range(batch):
        for head in range(heads):
            C, n = state.m[b, head].exp() * state.C[b, head], state.m[b, head].exp() * state.n[b, head]
            outputs = []
            for t in range(length):
                if starts is not None and starts[b, t]:
                    C, n = torch.zeros_like(C), torch.zeros_like(n)
                i = igate_preact[b, t, head]
                i = i.exp() if gate == "exp" else torch.sigmoid(i)
                f = torch.sigmoid(fgate_preact[b, t, head])
                C = f * C + i * torch.outer(k[b, t, head], v[b, t, head])
                n = f * n + i * k[b, t, head]
                query = q[b, t, head] / key_dim**0.5
                numerator = C.T @ query
                outputs.append(numerator / max((n @ query).abs(), torch.tensor(1.0)) if normaliser else numerator)
            rows.append((torch.stack(outputs), C, n))
    h, C, n = (torch.stack(parts).unflatten(0, (batch, heads)) for parts in zip(*rows, strict=True))
    return h.transpose(1, 2), C, n


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("positions", [None, [0, 5, 6]], ids=["one document", "documents"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_unstabilised_definition(form, positions, gate, normaliser):
    inputs, state, starts = make_inputs(length=11), make_state(gate), starts_at(positions, 11)
    function, options = FORMS[form]

    def stabilised(*args, initial_state, return_state, **kwargs):
        h, final = function(
            *args, initial_state=initial_state, return_state=True, document_start=starts, eps=0.0, **options, **kwargs
        )
        scale = final.m.exp()
        return h, MLSTMState(scale[..., None, None] * final.C, scale[..., None] * final.n, torch.zeros_like(final.m))

    def unstabilised(*args, initial_state, return_state, **kwargs):
        h, C, n = definition(*args, starts=starts, state=initial_state, **kwargs)
        return h, MLSTMState(C, n, torch.zeros_like(initial_state.m))

    kind = {"gate": gate, "normaliser": normaliser}
    assert_close(
        outputs_and_gradients(stabilised, inputs, state, **kind),
        outputs_and_gradients(unstabilised, inputs, state, **kind),
        1e-9,
    )


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_equals_the_recurrent_form_in_every_gate_regime(form, regime, gate, normaliser):
    inputs, state = make_inputs(regime), make_state(gate)
    function, options = FORMS[form]
    kind = {"gate": gate, "normaliser": normaliser, "document_start": starts_at([5, 20])}
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, **kind)
    assert_close(outputs_and_gradients(function, inputs, state, **kind, **options), expected, 1e-9)


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_equals_the_recurrent_form_for_every_document_layout(form, documents, with_state):
    inputs, state = make_inputs(), make_state() if with_state else None
    function, options = FORMS[form]
    starts = starts_at(DOCUMENTS[documents])
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state, document_start=starts)
    assert_close(outputs_and_gradients(function, inputs, state, document_start=starts, **options), expected, 1e-9)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 130])
def test_any_length(length):
    inputs, state = make_inputs(length=length), make_state()
    expected = outputs_and_gradients(mlstm_recurrent, inputs, state)
    assert_close(outputs_and_gradients(mlstm, inputs, state, reference_chunk_size=16), expected, 1e-9)


@pytest.mark.parametrize("split", [1, 8, 19, 36])
@pytest.mark.parametrize("documents", ["none", "chunk edges", "first and last"])
@pytest.mark.parametrize("regime", ["random", "initialisation", "huge input gate"])
def test_two_parts_with_a_passed_state_equal_one_pass(regime, documents, split):
    inputs, state, starts = make_inputs(regime), make_state(), starts_at(DOCUMENTS[documents])

    def in_two(*args, initial_state, return_state, document_start, **kwargs):
        h, middle = mlstm(
            *(x[:, :split] for x in args),
            initial_state=initial_state,
            return_state=True,
            document_start=None if document_start is None else document_start[:, :split],
            **kwargs,
        )
        rest, final = mlstm(
            *(x[:, split:] for x in args),
            initial_state=middle,
            return_state=True,
            document_start=None if document_start is None else document_start[:, split:],
            **kwargs,
        )
        return torch.cat([h, rest], dim=1), final

    whole = outputs_and_gradients(mlstm_quadratic, inputs, state, document_start=starts)
    assert_close(
        outputs_and_gradients(in_two, inputs, state, document_start=starts, reference_chunk_size=8), whole, 1e-9
    )


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
def test_prefill_then_single_steps_equal_one_pass(gate, normaliser):
    inputs, starts = make_inputs(), starts_at([3, 25])
    kind = {"gate": gate, "normaliser": normaliser, "return_state": True, "reference_chunk_size": 8}
    with torch.no_grad():
        expected, last = mlstm(*inputs, document_start=starts, **kind)
        h, state = mlstm(*(x[:, :20] for x in inputs), document_start=starts[:, :20], **kind)
        outputs = [h]
        for t in range(20, S):
            step = slice(t, t + 1)
            h, state = mlstm(*(x[:, step] for x in inputs), document_start=starts[:, step], initial_state=state, **kind)
            outputs.append(h)
    actual = {"h": torch.cat(outputs, dim=1), "C": state.C, "n": state.n, "m": state.m}
    assert_close(actual, {"h": expected, "C": last.C, "n": last.n, "m": last.m}, 1e-9)


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("form", ["recurrent", "quadratic", "chunkwise"])
def test_gradients_equal_finite_differences(form, gate, normaliser):
    function = {"recurrent": mlstm_recurrent, "quadratic": mlstm_quadratic, "chunkwise": mlstm_chunkwise}[form]
    torch.manual_seed(3)
    shapes = [(1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 2), (1, 5, 2), (1, 5, 2), (1, 2, 3, 2), (1, 2, 3)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    starts = torch.tensor([[False, False, False, True, False]])
    m = torch.full((1, 2), 0.3 if gate == "exp" else 0.0, dtype=torch.float64)
    options = {"chunk_size": 2} if form == "chunkwise" else {}

    def true_values(q, k, v, i, f, C, n):
        h, state = function(
            q,
            k,
            v,
            i,
            f,
            document_start=starts,
            initial_state=MLSTMState(C, n, m),
            return_state=True,
            gate=gate,
            normaliser=normaliser,
            # The stabiliser counts as a constant; what depends on it through eps is no part of the gradient.
            eps=0.0,
            **options,
        )
        return h, state.m.exp()[..., None, None] * state.C, state.m.exp()[..., None] * state.n

    assert torch.autograd.gradcheck(true_values, arguments)


def test_a_packed_document_equals_the_document_alone():
    inputs, starts = make_inputs(), starts_at([6, 15])
    starts[1] = starts[0]
    h, _ = mlstm(*inputs, document_start=starts, initial_state=make_state(), reference_chunk_size=8)
    alone, _ = mlstm(*(x[:, 6:15] for x in inputs), reference_chunk_size=4)
    assert_close({"h": h[:, 6:15]}, {"h": alone}, 1e-12)


def test_a_single_token_takes_the_recurrent_form_in_any_batch():
    inputs = make_inputs(length=1)
    h, state = mlstm(*inputs, initial_state=make_state(), return_state=True)
    expected, expected_state = mlstm_recurrent(*inputs, initial_state=make_state(), return_state=True)
    assert torch.equal(h, expected)
    assert torch.equal(state.C, expected_state.C)
    assert h.shape[0] == B


def test_state_is_returned_only_on_request():
    assert mlstm(*make_inputs())[1] is None


def test_inputs_may_be_strided():
    inputs = make_inputs()
    strided = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in inputs]
    assert all(not x.is_contiguous() for x in strided)
    assert torch.equal(mlstm(*strided)[0], mlstm(*inputs)[0])


def test_input_names_match_the_signature():
    q, k, v, i, f = make_inputs()
    named = dict(zip(INPUT_NAMES, (q, k, v, i, f), strict=True))
    assert torch.equal(mlstm(**named)[0], mlstm(q, k, v, i, f)[0])
