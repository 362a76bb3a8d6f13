"""Summaries of slices, folded, are the state of the whole sequence, in float64: values and gradients.

Axes: B batch, S sequence, NH heads, DK, DV head dimensions.
"""

from functools import reduce

import pytest
import torch
import torch.nn.functional as F

from kernels.mlstm import CellSettings, MLSTMState, SliceSummary, combine, mlstm, mlstm_state
from tests.kernels.cases import assert_close
from tests.kernels.mlstm_cases import (
    DOCUMENTS,
    GATE_KINDS,
    INPUT_NAMES,
    NH,
    REGIMES,
    B,
    make_inputs,
    make_state,
    mlstm_recurrent,
    outputs_and_gradients,
    starts_at,
    weights_of_loss,
)
from tests.kernels.mlstm_chain import run_chain

# Borders of slices of 37 tokens: uneven, with slices of one token, and with document starts of DOCUMENTS on them.
CUTS = {"two": [20], "uneven": [1, 9, 10, 25, 36]}


def slices(tensors, cuts, length=37):
    """The tensors (or None) cut along S: one list of them for each slice."""
    edges = [0, *cuts, length]
    pairs = zip(edges, edges[1:], strict=False)
    return [[None if x is None else x[:, begin:end] for x in tensors] for begin, end in pairs]


def summaries(inputs, starts, cuts, **settings):
    """Of the slices, each from its own tokens alone."""
    return [mlstm_state(*cut, document_start=start, **settings) for *cut, start in slices([*inputs[1:], starts], cuts)]


def as_dict(summary):
    state = summary.state
    return {"C": state.C, "n": state.n, "m": state.m, "log_forget_sum": summary.log_forget_sum}


def gradients(outputs, leaves):
    return dict(
        zip(
            leaves,
            torch.autograd.grad(outputs, list(leaves.values()), weights_of_loss(*outputs), materialize_grads=True),
            strict=True,
        )
    )


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
def test_fold_of_slices_is_the_state_of_the_whole(gate, normaliser, documents, cuts):
    check_fold("random", gate, normaliser, starts_at(DOCUMENTS[documents]), CUTS[cuts])


@pytest.mark.parametrize("documents", ["none", "first token", "several in one chunk"])
@pytest.mark.parametrize("regime", REGIMES)
def test_fold_in_every_gate_regime(regime, documents):
    check_fold(regime, "exp", True, starts_at(DOCUMENTS[documents]), CUTS["uneven"])


def test_fold_of_slices_of_one_token():
    check_fold("random", "exp", True, starts_at([0, 5, 6, 36]), range(1, 37))


def check_fold(regime, gate, normaliser, starts, cuts):
    """Also in the stabiliser m, token by token the same as in one pass, and in all gradients."""
    inputs, initial = make_inputs(regime), make_state(gate)
    settings = {"gate": gate, "normaliser": normaliser}
    parts = [SliceSummary.of_state(initial), *summaries(inputs, starts, cuts, **settings)]
    folded = reduce(combine, parts)
    _, whole = mlstm_recurrent(*inputs, document_start=starts, initial_state=initial, return_state=True, **settings)
    expected = {"C": whole.C, "n": whole.n, "m": whole.m}
    assert_close({name: x for name, x in as_dict(folded).items() if name in expected}, expected, 1e-12)
    leaves = dict(zip(INPUT_NAMES[1:], inputs[1:], strict=True)) | {"initial C": initial.C, "initial n": initial.n}
    actual = gradients([folded.state.C, folded.state.n], leaves)
    assert_close(actual, gradients([whole.C, whole.n], leaves), 1e-9)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_log_forget_sum_and_document_starts_of_slices(documents):
    inputs, starts = make_inputs(), starts_at(DOCUMENTS[documents])
    for summary, (fgate, start) in zip(
        summaries(inputs, starts, CUTS["uneven"]), slices([inputs[-1], starts], CUTS["uneven"]), strict=True
    ):
        for row in range(B):
            begins = [] if start is None else start[row].nonzero()[:, 0].tolist()
            assert summary.document_started[row].item() == bool(begins)
            expected = F.logsigmoid(fgate[row, begins[-1] if begins else 0 :]).sum(0)
            assert torch.allclose(summary.log_forget_sum[row], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("regime", REGIMES)
def test_combine_is_associative(regime, documents):
    a, b, c, d = summaries(make_inputs(regime), starts_at(DOCUMENTS[documents]), [9, 10, 25])
    left, tree = combine(combine(combine(a, b), c), d), combine(combine(a, b), combine(c, d))
    assert_close(as_dict(tree), as_dict(left), 1e-12)
    assert torch.equal(tree.document_started, left.document_started)


@pytest.mark.parametrize("documents", ["none", "first token", "chunk edges"])
def test_slices_run_from_folded_states_equal_one_pass(documents):
    """What ranks that share a sequence do: h and the gradients of everything, those through the exchange included."""
    inputs, starts, cuts = make_inputs(), starts_at(DOCUMENTS[documents]), CUTS["uneven"]
    empty = MLSTMState.empty(B, NH, inputs[0].shape[-1], inputs[2].shape[-1], device="cpu", dtype=torch.float64)
    before = [SliceSummary.of_state(empty)]
    for summary in summaries(inputs, starts, cuts)[:-1]:
        before.append(combine(before[-1], summary))
    h = [
        mlstm(*cut, document_start=start, initial_state=incoming.state)[0]
        for (*cut, start), incoming in zip(slices([*inputs, starts], cuts), before, strict=True)
    ]
    actual = torch.cat(h, dim=1)
    expected, _ = mlstm_recurrent(*inputs, document_start=starts)
    leaves = dict(zip(INPUT_NAMES, inputs, strict=True))
    assert_close({"h": actual}, {"h": expected}, 1e-12)
    assert_close(gradients([actual], leaves), gradients([expected], leaves), 1e-9)


def test_slices_with_all_gates_shut_stay_finite():
    inputs = make_inputs()
    with torch.no_grad():
        inputs[3].fill_(-torch.inf)
        inputs[4].fill_(-torch.inf)
    folded = reduce(combine, summaries(inputs, starts_at([5, 20]), [9, 10, 25]))
    leaves = dict(zip(INPUT_NAMES[1:], inputs[1:], strict=True))
    grads = gradients([folded.state.C, folded.state.n], leaves)
    assert not folded.state.C.any() and folded.state.m.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


def test_nothing_of_an_earlier_document_survives():
    starts = starts_at([22])
    results = []
    for seed in (0, 1):
        inputs, other = make_inputs(), make_inputs(seed=seed)
        cut = [
            torch.cat([y[:, :20], x[:, 20:]], dim=1).detach().requires_grad_()
            for x, y in zip(inputs, other, strict=True)
        ]
        folded = combine(*summaries(cut, starts, [20]))
        grads = torch.autograd.grad(folded.state.C.square().sum() + folded.log_forget_sum.sum(), cut[1:])
        assert not any(grad[:, :20].any() for grad in grads)
        results.append(folded)
    for name, value in as_dict(results[0]).items():
        assert torch.equal(value, as_dict(results[1])[name]), name


def test_combine_raises_the_precision_of_its_parts():
    summary = mlstm_state(*(x.detach().bfloat16() for x in make_inputs()[1:]))
    both = combine(summary, summary)
    assert {both.state.C.dtype, both.state.n.dtype, both.state.m.dtype, both.log_forget_sum.dtype} == {torch.float32}


@pytest.mark.parametrize(("gate", "normaliser"), GATE_KINDS)
@pytest.mark.parametrize("documents", ["none", "first token", "chunk edges"])
@pytest.mark.parametrize("regime", REGIMES)
def test_slices_that_pass_gradients_back_equal_one_pass(regime, documents, gate, normaliser):
    """Each slice has a graph of its own; the gradients of the states at both ends are among those compared."""
    inputs, starts, before = make_inputs(regime), starts_at(DOCUMENTS[documents]), make_state(gate)
    settings = CellSettings(gate, normaliser)
    expected = outputs_and_gradients(mlstm_recurrent, inputs, before, document_start=starts, **settings._asdict())
    h, state, gradients_of = run_chain(slices([*inputs, starts], CUTS["uneven"]), before, settings, "reference")
    actual = {"h": h, "C": state.C, "n": state.n, "m": state.m}
    found = gradients_of(*weights_of_loss(h, state.C, state.n))
    actual |= dict(zip(list(expected)[4:], found, strict=True))
    assert_close(actual, expected, 1e-10)
