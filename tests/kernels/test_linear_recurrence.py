"""The decaying linear recurrence: its definition, documents, states, gradients, and flash-linear-attention's own forms.

Axes as in kernels/linear_recurrence.
"""

import importlib

import pytest
import torch
from torch.autograd import gradcheck

from kernels.linear_recurrence import RecurrenceInputs, linear_recurrence
from kernels.linear_recurrence.fla_kernels import document_places

FORMS = ["head", "feature", "delta"]
B, S, NH, DK, DV = 2, 11, 2, 3, 4


def run(document_start=None, initial_state=None, **given):
    of_tokens = RecurrenceInputs(**given, scale=0.7)
    return linear_recurrence(of_tokens, document_start=document_start, initial_state=initial_state, return_state=True)


def inputs(form: str, length: int = S, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Decays from 0.1 to 1; with the delta rule keys of length 1, as the layer has them."""
    generator = torch.Generator().manual_seed(11)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = make(B, length, NH, DK), make(B, length, NH, DK), make(B, length, NH, DV)
    decays = (B, length, NH, DK) if form == "feature" else (B, length, NH)
    found = {"q": q, "k": k / k.norm(dim=-1, keepdim=True) if form == "delta" else k, "v": v}
    found["log_decay"] = -make(*decays).abs()
    if form == "delta":
        found["beta"] = torch.sigmoid(make(B, length, NH))
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def starts() -> torch.Tensor:
    document_start = torch.zeros(B, S, dtype=torch.bool)
    document_start[0, [0, 4, 5]] = document_start[1, [7]] = True
    return document_start


@pytest.mark.parametrize("form", FORMS)
def test_the_definition_written_as_matrices(form):
    """Row 0 of the batch, head 1: y[t] from the product of all transitions, as the papers write it."""
    given = inputs(form)
    y, state = run(**given)
    q, k, v = (given[name][0, :, 1] for name in "qkv")
    memory = torch.zeros(DK, DV, dtype=torch.float64)
    for t in range(S):
        decay = given["log_decay"][0, t, 1].exp()
        transition = torch.diag(decay.expand(DK))
        beta = torch.ones(())
        if form == "delta":
            beta = given["beta"][0, t, 1]
            transition = (torch.eye(DK) - beta * torch.outer(k[t], k[t])) @ transition
        memory = transition @ memory + beta * torch.outer(k[t], v[t])
        torch.testing.assert_close(y[0, t, 1], 0.7 * memory.T @ q[t])
    torch.testing.assert_close(state[0, 1], memory)


@pytest.mark.parametrize("form", FORMS)
def test_one_token_at_a_time_is_the_whole_pass(form):
    given = inputs(form)
    y, state = run(**given, document_start=starts())
    carried, pieces = None, []
    for begin, end in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 11)):
        cut = {name: tensor[:, begin:end] for name, tensor in given.items()}
        piece, carried = run(**cut, document_start=starts()[:, begin:end], initial_state=carried)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(carried, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_document_knows_no_bit_of_the_one_before(form):
    given = inputs(form)
    other = {name: tensor.clone() for name, tensor in given.items()}
    for tensor in other.values():
        tensor[0, :4] = tensor[0, :4] * 0.9 - 0.05
    first, second = (run(**values, document_start=starts()) for values in (given, other))
    assert torch.equal(first[0][:, 4:], second[0][:, 4:]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0][0, :4], second[0][0, :4])
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    run(**leaves, document_start=starts())[0][0, 4:].sum().backward()
    assert all(not tensor.grad[0, :4].any() and tensor.grad[0, 4:].any() for tensor in leaves.values())


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    given = inputs(form, length=4)
    document_start = torch.zeros(B, 4, dtype=torch.bool)
    document_start[0, 2] = True
    state = torch.randn(B, NH, DK, DV, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [*given, "initial_state"]

    def function(*tensors):
        return run(**dict(zip(names, tensors, strict=True)), document_start=document_start)

    assert gradcheck(function, [tensor.requires_grad_() for tensor in (*given.values(), state)])


@pytest.mark.parametrize("form", FORMS)
def test_the_naive_forms_of_flash_linear_attention_agree(form):
    """Float32, in which those compute."""
    try:
        if form == "head":
            naive = importlib.import_module("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
        elif form == "feature":
            naive = importlib.import_module("fla.ops.gla.naive").naive_recurrent_gla
        else:
            naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    except ImportError as error:
        pytest.skip(f"flash-linear-attention cannot be imported: {error}")
    given = inputs(form, dtype=torch.float32)
    state = torch.randn(B, NH, DK, DV, generator=torch.Generator().manual_seed(1))
    of_tokens = RecurrenceInputs(**given, scale=DK**-0.5)
    y, behind = linear_recurrence(of_tokens, initial_state=state, return_state=True)
    decay = {"gk" if form == "feature" else "g": given.pop("log_decay")}
    theirs, theirs_behind = naive(**given, **decay, initial_state=state, output_final_state=True)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(behind, theirs_behind, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_of_flash_linear_attention_agree(form):
    pytest.importorskip("fla")
    from kernels.preflight import LinearRecurrenceCase, compare

    findings = compare(
        LinearRecurrenceCase(4, 64, 128, torch.bfloat16, per_feature=form == "feature", delta_rule=form == "delta"),
        torch.device("cuda"),
    )
    assert findings and all(finding.agrees for finding in findings), findings


def test_places_of_documents():
    places, first = document_places(starts())
    assert places.tolist() == [0, 4, 5, 11, 18, 22] and first.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "unknown linear recurrence backend 'triton'; use one of auto, reference, fla"),
        ({"backend": "fla"}, "linear recurrence backend 'fla' needs a CUDA device, and the tensors are on 'cpu'"),
        ({"k": torch.zeros(B, S, NH, 2)}, "a linear recurrence needs q and k"),
        ({"log_decay": torch.zeros(B, S)}, r"log_decay must be \[B, S, NH\] or \[B, S, NH, DK\]"),
        ({"beta": torch.zeros(B, S)}, r"the delta rule needs beta and log_decay \[B, S, NH\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        backend = change.get("backend", "auto")
        given = {**inputs("head"), **{name: value for name, value in change.items() if name != "backend"}}
        linear_recurrence(RecurrenceInputs(**given), backend=backend)
