"""Before a run on GPUs: do the kernels compute there what the references do, in the shapes of the run's model?

What a run needs of its configuration and files is looked at in train/requirements.py and needs no GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels import preflight
from kernels.preflight import Case, Finding, LossCase
from model.layers import KernelUse, layer_kinds
from train.config import RunConfig
from train.errors import RunError
from train.parallel.mesh import Mesh
from train.run_directory import EventLog


class Report(NamedTuple):
    """Of one rank: the name of its GPU, what comparisons found, and why cases did not run."""

    device: str
    findings: list[Finding]
    failures: Sequence[str] = ()


def check_kernels(config: RunConfig, mesh: Mesh, events: EventLog) -> None:
    """Compare every kernel of the run with its reference on this rank's GPU and log the errors. Collective.

    Does nothing without a GPU, where the references run, or with training.kernel_preflight=false.

    Raises:
        RunError: on every rank, if a kernel disagrees on any, or the installed Triton is one that was not tested.
    """
    if mesh.device.type != "cuda" or not config.training.kernel_preflight:
        return
    started = time.perf_counter()
    report = checked(kernel_cases(config), mesh.device, torch.cuda.get_device_name(mesh.device))
    # The reference's float64 buffers are of no use to the engine.
    torch.cuda.empty_cache()
    reports = mesh.gather_objects(report, group="world")
    worst = largest_errors([finding for of_rank in reports for finding in of_rank.findings])
    events.append("kernel_preflight", seconds=round(time.perf_counter() - started, 3), errors=worst)
    problems = kernel_problems(reports)
    if problems:
        raise RunError("\n  - ".join(["the kernels cannot be trusted here:", *problems]))


def checked(cases: Sequence[Case], device: torch.device, name: str) -> Report:
    """Compare every case with its reference on a GPU called `name`; one that does not run there stops none."""
    findings: list[Finding] = []
    failures = []
    for case in cases:
        try:
            findings += preflight.compare(case, device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # Behind an error of the GPU itself no other case runs either.
            raise
        except RuntimeError as error:
            # Such as a kernel of another package that refuses this GPU or this Triton.
            reason = str(error).strip().partition("\n")[0]
            failures.append(f"{case} does not run: {reason}")
    return Report(name, findings, failures)


def kernel_cases(config: RunConfig) -> list[Case]:
    """Every kernel call that differs in shape, dtype or setting, where the configuration leaves kernels the choice."""
    dtype = config.precision.compute_dtype
    # Autocast casts what enters a product; weights that enter none stay float32.
    weight_dtype = config.precision.weight_dtype(config.parallel.zero_stage)
    model = config.model
    batches = {config.training.micro_batch_size: True}
    if config.evaluation.sets:
        # The batch of an evaluation may have other tiles.
        batches.setdefault(config.evaluation.batch_size, False)
    use = KernelUse(dtype, weight_dtype, batches)
    kinds = {kind.name: kind for kind in layer_kinds(model)}
    cases = [case for kind in kinds.values() for case in kind.kernel_cases(model, use)]
    loss = (model.d_model, model.vocab_size, dtype, weight_dtype, model.logit_soft_cap)
    cases.append(LossCase(*loss, z_loss_weight=config.training.z_loss_weight))
    return [case for case in cases if case.backend != "reference"]


def largest_errors(findings: list[Finding]) -> dict[str, float | None]:
    """Of each case's tensors the worst for its limit: "case: tensor" -> error, None (JSON has no NaN) if not finite."""
    worst: dict[str, Finding] = {}
    for finding in findings:
        before = worst.get(finding.operation)
        if before is None or _badness(finding) > _badness(before):
            worst[finding.operation] = finding
    return {
        f"{finding.operation}: {finding.tensor}": finding.error if math.isfinite(finding.error) else None
        for finding in worst.values()
    }


def _badness(finding: Finding) -> float:
    return math.inf if math.isnan(finding.error) else finding.error / finding.limit


def kernel_problems(reports: Sequence[Report]) -> list[str]:
    """Everything that speaks against the kernels, by the report of each rank, and last what to do; empty if nothing."""
    unsupported = preflight.unsupported_triton()
    problems = [] if unsupported is None else [unsupported]
    found: dict[str, list[int]] = {}
    for rank, (device, findings, failures) in enumerate(reports):
        for text in [*failures, *(str(finding) for finding in findings if not finding.agrees)]:
            found.setdefault(f"{text} ({device})", []).append(rank)
    problems += [f"{text} on rank {', '.join(map(str, ranks))}" for text, ranks in found.items()]
    if problems:
        problems.append(
            "install another Triton; recurrences and head norms can also run on their references (backend=reference in "
            "model.mlstm, model.preup_mlstm or model.slstm); training.kernel_preflight=false trains without this check"
        )
    return problems
