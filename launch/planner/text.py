"""A plan as a reader's page: memory by component, what a step's time goes to, the whole run, other layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.planner.errors import Errors
from launch.planner.layouts import Layout, room_of
from train.config import RunConfig
from train.estimate.machine import Machine
from train.plan import Plan, gib

_WIDTH = 11


def page(config: RunConfig, machine: Machine, chosen: Layout, errors: Errors) -> str:
    """The plan of `config`, whose layout is `chosen`."""
    plan = chosen.plan
    lines = [
        plan.describe(),
        "",
        *_memory(config, machine, chosen),
        "",
        *_step(plan),
        "",
        *_run(plan),
        "",
        *_provenance(machine, errors),
    ]
    return "\n".join(lines)


def _memory(config: RunConfig, machine: Machine, chosen: Layout) -> Iterator[str]:
    plan = chosen.plan
    room = room_of(machine)
    yield f"memory of a rank{_of_stage(plan)}, GiB of the {room / 2**30:.1f} that a run finds on {machine.device}"
    others = plan.activation_bytes - plan.chunk_state_bytes - plan.logit_bytes
    recomputed = f"recomputing {config.parallel.activation_checkpointing}"
    rows = [
        ("weights", plan.weight_bytes),
        ("gradients", plan.gradient_bytes),
        ("optimizer", plan.optimizer_bytes),
        (f"activations, {recomputed}", others),
        ("states between chunks of the recurrences", plan.chunk_state_bytes),
        ("logits in work", plan.logit_bytes),
        ("buckets and gathered weights", plan.communication_bytes),
        ("state carried from step to step", plan.carried_bytes),
        ("gradients and copies at the end, instead", plan.update_bytes if plan.peaks_at_the_end_of_a_step else 0.0),
        ("at the peak", plan.rank_bytes),
    ]
    for name, count in rows:
        if count:
            yield f"  {name:44s}{count / 2**30:9.2f}"
    if plan.graph_bytes:
        yield f"  {'and held by CUDA graphs meanwhile':44s}{plan.graph_bytes / 2**30:9.2f}"
    verdict = {"yes": "it fits", "tight": "it may not fit", "no": "it does not fit"}[chosen.fits]
    saving = f"a save takes no more on the GPU, and {gib(plan.save_bytes)} in the memory of its host"
    yield f"  {verdict}; {saving}"


def _of_stage(plan: Plan) -> str:
    return " of the largest stage" if len(plan.stages) > 1 else ""


def _step(plan: Plan) -> Iterator[str]:
    step = plan.step_seconds
    assert step is not None, "the machine is calibrated"
    yield "a step, ms"
    rows = [
        ("forward and backward", step.passes),
        ("computed again", step.recomputation),
        ("waiting for the host", step.host),
        ("waiting in the pipeline", step.pipeline),
        ("communication that nothing is computed beside", step.communication),
        ("norm, clipping, optimizer, between steps", step.update),
        ("in all", step.total),
    ]
    for name, seconds in rows:
        if seconds > 5e-6:
            yield f"  {name:47s}{1e3 * seconds:9.1f}  {seconds / step.total:6.1%}"
    rate = plan.tokens_per_second_per_device
    assert rate is not None
    shares = plan.model_flops_utilisation(rate)
    share = "" if shares["mfu_6n"] is None else f"; {shares['mfu_6n']:.1%} of the peak by 6N"
    exact = "" if shares["mfu_exact"] is None else f", {shares['mfu_exact']:.1%} by exact FLOPs"
    yield f"  {rate:,.0f} tokens/s a GPU, {rate * plan.world_size:,.0f} of all{share}{exact}"


def _run(plan: Plan) -> Iterator[str]:
    assert plan.predicted_seconds is not None
    hours = plan.predicted_seconds / 3600
    yield (
        f"the run    {plan.tokens_left:,} tokens in {plan.steps_left:,} steps: {hours:,.1f} h ({hours / 24:.1f} days), "
        f"{hours * plan.world_size:,.0f} GPU-hours"
    )
    flops = plan.flops_per_token_exact * plan.tokens_left
    yield f"{'':{_WIDTH}}{flops:.3g} FLOPs; {gib(plan.checkpoint_bytes)} a checkpoint"


def _provenance(machine: Machine, errors: Errors) -> Iterator[str]:
    provenance = machine.calibration.provenance
    versions = ", ".join(
        f"{name} {provenance[name]}" for name in ("torch", "triton", "deepspeed") if name in provenance
    )
    yield f"measured   {machine.device}, {provenance.get('date', 'no date')}, {versions or 'no versions'}"
    yield f"{'':{_WIDTH}}{errors.describe()}"
    if not machine.calibration.steps:
        yield f"{'':{_WIDTH}}no steps were measured: what blocks move, and what their host takes, are as on an H200"
    elif machine.coefficients.assumed:
        yield f"{'':{_WIDTH}}not measured, as on an H200: {', '.join(machine.coefficients.assumed)}"
    links, of_data_sheets = machine.links, []
    if not links.inside_is_measured and machine.ranks > machine.nodes:
        of_data_sheets.append(f"{links.inside / 1e9:.0f} GB/s of a GPU within a node")
    if not links.between_is_measured and machine.nodes > 1:
        of_data_sheets.append(f"{links.between / 1e9:.0f} GB/s of a node to others")
    if of_data_sheets:
        yield f"{'':{_WIDTH}}not measured, by data sheet: {', '.join(of_data_sheets)}"


def table(chosen: Layout, others: Sequence[Layout], shown: int) -> str:
    """The first of `others`, which are in their order, and where the chosen one stands among them.

    Of each ZeRO stage with as many stages and slices there is the best micro-batch.
    """
    fitting = sum(layout.fits == "yes" for layout in others)
    lines = [
        f"layouts    {len(others)} were tried, {fitting} fit; the fastest:",
        "           zero  recompute  micro batch  sequence  pipeline     GiB  fits   s a step  tokens/s a GPU",
    ]
    place = next((i for i, layout in enumerate(others) if layout.overrides == chosen.overrides), None)
    best: dict[tuple[int, int, int], int] = {}
    for number, layout in enumerate(others):
        best.setdefault((layout.zero_stage, layout.sequence, layout.pipeline), number)
    wanted = list(best.values())[:shown]
    if place is not None and place not in wanted:
        wanted = sorted([*wanted, place])
    for number in wanted:
        layout = others[number]
        mark = "  <- this one" if number == place else ""
        rate = layout.plan.tokens_per_second_per_device
        lines.append(
            f"{number + 1:8d}   {layout.zero_stage:4d}  {layout.activation_checkpointing:>9s}  "
            f"{layout.micro_batch_size:11d}  {layout.sequence:8d}  {layout.pipeline:8d}  "
            f"{layout.needed_bytes / 2**30:6.1f}  {layout.fits:>5s}  {layout.seconds:9.3f}  {rate:14,.0f}{mark}"
        )
    if others and others[0].fits != "no" and place != 0:
        lines.append(f"the first: {' '.join(others[0].overrides)}")
    return "\n".join(lines)
