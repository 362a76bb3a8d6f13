"""The check before a run: it accepts the kernels as they are, and refuses kernels that are really broken."""

import math

import pytest
import torch

from kernels import preflight, triton_support
from kernels.preflight import Finding, HeadNormCase, LossCase, MLSTMCase, SLSTMCase, compare
from tests.kernels.triton_cases import COMPILED

SIXTEEN_BIT = torch.bfloat16 if COMPILED else torch.float16
SINGLE = torch.float32
CASES = [
    MLSTMCase(1, 16, 32, SIXTEEN_BIT, backend="triton"),
    MLSTMCase(2, 32, 16, SINGLE, -10.0, batch=1, backend="triton"),
    MLSTMCase(1, 16, 16, SINGLE, gate="sigmoid", normaliser=False, backend="triton"),
    SLSTMCase(1, 16, SINGLE, backend="triton"),
    SLSTMCase(1, 16, SIXTEEN_BIT, 15.0, backend="triton"),
    HeadNormCase(2, 48, SIXTEEN_BIT, SINGLE, 1e-6, True, "triton"),
    HeadNormCase(2, 48, SINGLE, SIXTEEN_BIT, 1e-5, False, "triton"),
    LossCase(32, 100, SINGLE, SINGLE, 30.0, 1e-4, backend="triton"),
    LossCase(32, 100, SIXTEEN_BIT, SINGLE, is_sum=False, backend="triton"),
]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """The interpreter is slow. Two chunks of its 64 tokens, a remainder, and one sequence where a case does not say."""
    if not COMPILED:
        monkeypatch.setattr(preflight, "LENGTH", 135)
        monkeypatch.setattr(preflight, "BATCH", 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_their_references(case, device):
    findings = compare(case, device)
    inputs = case.inputs(torch.Generator())
    assert {f"gradient of {name}" for name in inputs} < {finding.tensor for finding in findings}
    assert not [str(finding) for finding in findings if not finding.agrees]
    # Zero would mean that the reference was compared with itself.
    assert all(finding.operation == str(case) for finding in findings) and any(f.error > 0 for f in findings)


def test_a_scale_that_is_off_by_three_hundredths_is_found(monkeypatch, device):
    from kernels.mlstm.chunkwise.problem import Problem

    monkeypatch.setattr(Problem, "scale", property(lambda self: 1.03 * self.key_dim**-0.5))
    findings = compare(MLSTMCase(1, 16, 16, SIXTEEN_BIT, gate="sigmoid", normaliser=False, backend="triton"), device)
    assert not [finding.tensor for finding in findings if finding.agrees]
    assert findings[0].error == pytest.approx(0.03, rel=0.1)


def test_tiles_narrower_than_a_head_are_found(monkeypatch, device):
    from kernels.head_norm import fused

    settings = fused._tile_settings
    monkeypatch.setattr(fused, "_tile_settings", lambda *a: settings(*a) | {"WIDTH": 32})
    findings = compare(HeadNormCase(2, 48, SINGLE, SINGLE, 1e-6, False, "triton"), device)
    assert [finding.tensor for finding in findings if not finding.agrees][0] == "y"


def test_kernels_that_only_an_evaluation_runs_are_checked(monkeypatch, device):
    from kernels.cross_entropy import fused

    store = fused.store_losses

    def store_wrong(logits, targets, losses, *rest):
        store(logits, targets, losses, *rest)
        losses.mul_(1.01)

    monkeypatch.setattr(fused, "store_losses", store_wrong)
    findings = compare(LossCase(32, 100, SINGLE, SINGLE, 30.0, backend="triton"), device)
    assert [finding.tensor for finding in findings if not finding.agrees] == ["loss without gradients"]
    assert [f.error for f in findings if not f.agrees] == [pytest.approx(0.01, rel=0.01)]


def test_of_the_batch_of_an_evaluation_the_outputs_are_compared(device):
    findings = compare(MLSTMCase(1, 16, 16, SIXTEEN_BIT, backend="triton", trains=False), device)
    assert [finding.tensor for finding in findings] == ["h without gradients"]
    assert findings[0].agrees and findings[0].error > 0


def test_what_a_disagreement_says():
    finding = Finding("mLSTM (8 heads of 256/512)", "gradient of q", 0.25, 6e-3)
    assert not finding.agrees
    assert str(finding) == "mLSTM (8 heads of 256/512): gradient of q is off by 2.5e-01 of its norm, more than 6e-03"
    assert not Finding("loss", "loss", math.nan, 1.0).agrees


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [((3, 5), False), ((3, 6), True), ((3, 8), True), ((3, 9), False), ((4, 0), False)],
)
def test_the_version_of_triton_is_checked(monkeypatch, version, is_supported):
    assert preflight.unsupported_triton() is None
    monkeypatch.setattr(triton_support, "triton_version", lambda: version)
    reason = preflight.unsupported_triton()
    assert (reason is None) == is_supported
    if not is_supported:
        assert "the kernels were tested with 3.6 and later, before 3.9" in reason
