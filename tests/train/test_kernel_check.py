"""Which kernels a run checks before its first step, and what it says where they disagree."""

import math
from dataclasses import replace

import pytest
import torch

from kernels import preflight
from kernels.preflight import Finding, HeadNormCase, LossCase, MLSTMCase, SLSTMCase
from model.config import MLSTMConfig, ModelConfig, PreUpMLSTMConfig, SLSTMConfig
from tests.runs import TINY_RUN, environment, run_train
from train.config import (
    EvaluationConfig,
    EvaluationSetConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
)
from train.kernel_check import Report, checked, kernel_cases, kernel_problems, largest_errors
from train.run_directory import read_events

BF16, FP32 = torch.bfloat16, torch.float32
MIXED = ModelConfig(
    d_model=64, vocab_size=128, n_blocks=3, slstm_at=[1], mlstm=MLSTMConfig(n_heads=2, gate="sigmoid"),
    slstm=SLSTMConfig(n_heads=4, gate_soft_cap=15.0),
)  # fmt: skip
NEURIPS = ModelConfig(
    family="neurips", d_model=64, vocab_size=128, n_blocks=2, logit_soft_cap=None, preup_mlstm=PreUpMLSTMConfig()
)


def test_each_call_of_a_model_that_differs_is_a_case():
    config = RunConfig(model=MIXED, training=TrainingConfig(micro_batch_size=8, z_loss_weight=1e-4))
    assert kernel_cases(config) == [
        MLSTMCase(2, 16, 32, BF16, 2.0, "sigmoid", batch=8),
        MLSTMCase(2, 16, 32, BF16, -10.0, "sigmoid", batch=8),
        HeadNormCase(2, 32, BF16, BF16, 1e-6, True),
        SLSTMCase(4, 16, BF16, 15.0),
        HeadNormCase(4, 16, FP32, BF16, 1e-5, False),
        LossCase(64, 128, BF16, BF16, 30.0, 1e-4),
    ]


def test_the_batch_of_an_evaluation_is_checked_where_it_is_another():
    """The mLSTM has other tiles for few sequences than for many."""
    for batch, expected in ((8, [1, 1, 8, 8]), (1, [1, 1])):
        config = RunConfig(
            model=MIXED,
            training=TrainingConfig(micro_batch_size=1),
            evaluation=EvaluationConfig(batch_size=batch, sets={"held_out": EvaluationSetConfig()}),
        )
        cases = [case for case in kernel_cases(config) if isinstance(case, MLSTMCase)]
        assert [case.batch for case in cases] == expected
        assert all(case.trains == (case.batch == 1) for case in cases)
        # What a message calls them tells them apart.
        assert len({str(case) for case in cases}) == len(cases)
    without_sets = replace(config, evaluation=EvaluationConfig(batch_size=8))
    assert [case.batch for case in kernel_cases(without_sets) if isinstance(case, MLSTMCase)] == [1, 1]


def test_the_neurips_layer_has_keys_as_wide_as_values():
    training = TrainingConfig(micro_batch_size=64)
    assert kernel_cases(RunConfig(model=NEURIPS, training=training, precision=PrecisionConfig("fp32"))) == [
        MLSTMCase(4, 32, 32, FP32, 2.0, batch=32),
        MLSTMCase(4, 32, 32, FP32, -10.0, batch=32),
        HeadNormCase(4, 32, FP32, FP32, 1e-5, False),
        LossCase(64, 128, FP32, FP32),
    ]


def test_under_autocast_weights_outside_products_stay_float32():
    cases = kernel_cases(RunConfig(model=MIXED, parallel=ParallelConfig(zero_stage=0)))
    assert {case.weight_dtype for case in cases if isinstance(case, HeadNormCase | LossCase)} == {FP32}
    assert {case.dtype for case in cases if isinstance(case, MLSTMCase | SLSTMCase)} == {BF16}


def test_epsilons_and_backends_are_those_of_the_layers():
    model = replace(
        MIXED,
        mlstm=replace(MIXED.mlstm, cell_eps=1e-4, head_norm_eps=1e-3, backend="triton"),
        slstm=replace(MIXED.slstm, head_norm_eps=1e-2, backend="triton"),
    )
    *cases, loss = kernel_cases(RunConfig(model=model))
    assert {case.backend for case in cases} == {"triton"} and loss.backend == "auto"
    assert {case.eps for case in cases if isinstance(case, MLSTMCase)} == {1e-4}
    assert [case.eps for case in cases if isinstance(case, HeadNormCase)] == [1e-3, 1e-2]


def test_what_runs_on_its_reference_is_no_case():
    model = replace(MIXED, mlstm=replace(MIXED.mlstm, backend="reference"))
    cases = kernel_cases(RunConfig(model=model))
    assert [type(case) for case in cases] == [SLSTMCase, HeadNormCase, LossCase]


GOOD = Finding("loss", "loss", 1e-4, 4e-3)
BAD = Finding("mLSTM", "gradient of q", 0.5, 6e-3)
NOT_A_NUMBER = Finding("mLSTM", "h", math.nan, 4e-3)


def test_a_disagreement_names_tensor_gpu_ranks_and_what_to_do():
    assert kernel_problems([Report("H200", [GOOD]), Report("H200", [GOOD])]) == []
    problems = kernel_problems([Report("H200", [BAD, GOOD]), Report("H100", [GOOD]), Report("H200", [BAD])])
    assert problems[0] == "mLSTM: gradient of q is off by 5.0e-01 of its norm, more than 6e-03 (H200) on rank 0, 2"
    assert len(problems) == 2 and "backend=reference" in problems[1] and "kernel_preflight=false" in problems[1]


def test_a_triton_that_was_not_tested_is_a_problem(monkeypatch):
    monkeypatch.setattr(preflight, "unsupported_triton", lambda: "Triton 9.9 is installed")
    assert kernel_problems([Report("H200", [GOOD])])[0] == "Triton 9.9 is installed"


def test_a_kernel_that_refuses_the_gpu_is_a_problem_and_the_others_are_compared(monkeypatch):
    cases = [HeadNormCase(2, 32, BF16, BF16, 1e-6, True), LossCase(64, 128, BF16, BF16, 30.0, 1e-4)]

    def compare(case, device):
        if case is cases[0]:
            raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs are wrong here\nSee #640")
        return [GOOD]

    monkeypatch.setattr(preflight, "compare", compare)
    report = checked(cases, torch.device("cpu"), "H200")
    assert report.findings == [GOOD]
    problems = kernel_problems([report, Report("H200", [GOOD])])
    assert problems[0] == (
        f"{cases[0]} does not run: Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs are wrong here (H200) on rank 0"
    )
    assert len(problems) == 2


def test_the_worst_tensor_of_each_case_is_logged():
    near = Finding("mLSTM", "gradient of fgate_preact", 0.6, 1.0)
    assert largest_errors([near, BAD, GOOD]) == {"mLSTM: gradient of q": 0.5, "loss: loss": 1e-4}
    assert largest_errors([BAD, NOT_A_NUMBER, BAD]) == {"mLSTM: h": None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_on_a_gpu_checks_its_kernels(small_corpus, tmp_path, monkeypatch, precision):
    # Child processes of tests see no GPU otherwise.
    monkeypatch.setattr("tests.runs.environment", lambda: {**environment(), "CUDA_VISIBLE_DEVICES": "0"})
    base = [*TINY_RUN, f"run_root={tmp_path}", f"corpus.directory={small_corpus}", "training.total_steps=1"]
    for name, is_on in (("on", "true"), ("off", "false")):
        done = run_train([*base, f"precision={precision}", f"name={name}", f"training.kernel_preflight={is_on}"])
        assert done.returncode == 0, done.stderr
    (event,) = [line for line in read_events(tmp_path / "on") if line["event"] == "kernel_preflight"]
    assert event["seconds"] > 0
    assert all(0 < error < 1e-2 for error in event["errors"].values()) and len(event["errors"]) >= 5
    assert "kernel_preflight" not in [line["event"] for line in read_events(tmp_path / "off")]
