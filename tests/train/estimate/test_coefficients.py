"""What a calibration says of a GPU whose times are known, and the step that follows from it."""

import dataclasses

import pytest

from conf import compose
from model.accounting import count_parameters
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.layers.base import CellForm
from tests.train.estimate import invented_gpu
from train.config import RunConfig
from train.estimate.calibration import CollectivePoint, ProductPoint
from train.estimate.coefficients import TYPICAL, fit
from train.estimate.links import LATENCY, Links
from train.estimate.machine import Machine
from train.estimate.rates import Rates
from train.plan import make_plan

BASE = ["name=x", "corpus.directory=y", "training.total_steps=1000", "recipe=none", "logging.monitor_interval=0"]


@pytest.fixture(scope="module")
def calibration():
    return dataclasses.replace(invented_gpu.bare(), steps=invented_gpu.steps())


def test_the_coefficients_of_a_known_gpu_are_found_again(calibration):
    found = fit(calibration)
    for execution in (WRITTEN, COMPILED):
        assert found.elementwise_of(execution, "mlstm") == pytest.approx(invented_gpu.ELEMENTWISE[execution], rel=0.01)
    assert found.elementwise_of(CAPTURED, "mlstm") == pytest.approx(invented_gpu.ELEMENTWISE[CAPTURED], rel=0.01)
    assert found.forward_share == pytest.approx(invented_gpu.FORWARD_SHARE, rel=0.01)
    assert found.logits == pytest.approx(invented_gpu.LOGITS, rel=0.02)
    assert found.unaligned_head == pytest.approx(invented_gpu.UNALIGNED, rel=0.02)
    assert dataclasses.astuple(found.update) == pytest.approx(invented_gpu.UPDATE, rel=0.01)
    for execution, (block, rest) in invented_gpu.HOST.items():
        assert found.host[execution].block == pytest.approx(block, rel=0.01)
        assert found.host[execution].rest == pytest.approx(rest, rel=0.01)
    assert found.assumed == []
    # A kind that was not measured has the mLSTM's, and as much more of it written as that has.
    assert found.elementwise_of(COMPILED, "slstm") == found.elementwise_of(COMPILED, "mlstm")
    assert found.elementwise_of(WRITTEN, "preup_mlstm") == pytest.approx(invented_gpu.ELEMENTWISE[WRITTEN], rel=0.02)


def test_what_steps_do_not_show_is_taken_from_another_gpu_and_named():
    found = fit(invented_gpu.bare())
    assert dataclasses.replace(found, assumed=[]) == TYPICAL
    assert "the host's time of compiled blocks" in found.assumed and "the time of an update" in found.assumed


def test_rates_are_those_measured_and_lie_between_them_elsewhere():
    points = [ProductPoint(tokens, width, 6.0 * tokens * width**2 / rate) for tokens, width, rate in (
        (2048, 512, 2e14), (2048, 2048, 4e14), (32768, 512, 3e14), (32768, 2048, 6e14)
    )]  # fmt: skip
    rates = Rates(dataclasses.replace(invented_gpu.bare(), products=points, copy_bytes_per_second=1e18))

    def rate(tokens, inputs, outputs):
        return 2.0 * tokens * inputs * outputs / rates.products(tokens, inputs, outputs)

    assert rate(2048, 512, 512) == pytest.approx(2e14) and rate(32768, 2048, 2048) == pytest.approx(6e14)
    # Of a width that was not measured; half-way in logarithms: the geometric mean.
    assert rate(2048, 1024, 1024) == pytest.approx((2e14 * 4e14) ** 0.5)
    assert rate(8192, 512, 512) == pytest.approx((2e14 * 3e14) ** 0.5)
    assert rate(2048, 512, 2048) == rate(2048, 1024, 1024)
    # Beyond what was measured, the last rate.
    assert rate(65536, 8192, 8192) == pytest.approx(6e14) and rate(128, 64, 64) == pytest.approx(2e14)


def test_a_product_with_few_outputs_is_bound_by_what_it_reads():
    rates = Rates(invented_gpu.bare())
    read = 2.0 * (16384 * (4096 + 8) + 4096 * 8)
    assert rates.products(16384, 4096, 8) == pytest.approx(read / invented_gpu.COPY)


def test_cells_take_longer_the_way_their_kind_does():
    rates = Rates(invented_gpu.bare())
    mlstm = CellForm("mlstm", 4, 256, 512)
    assert rates.cell(mlstm, 4, 4096) == pytest.approx((0.4e-3, 1.4e-3))
    assert rates.cell(mlstm, 8, 8192) == pytest.approx((1.6e-3, 5.6e-3))
    # The sLSTM goes through time: rows come free up to what fills the GPU, heads of fewer rows too.
    slstm = CellForm("slstm", 4, 256, 256)
    assert rates.cell(slstm, 1, 2048) == rates.cell(slstm, 64, 2048) == pytest.approx((4e-3, 10e-3))
    assert rates.cell(slstm, 128, 1024) == pytest.approx((4e-3, 10e-3))
    attention = CellForm("attention", 16, 128, 128)
    assert rates.cell(attention, 4, 8192) == pytest.approx((4e-3, 16e-3))


def step(calibration, world, *overrides, nodes=1):
    config = compose(RunConfig, "train", [*BASE, *overrides])
    plan = make_plan(config, world, machine=Machine(calibration, nodes, world))
    return config, plan, plan.step_seconds


def test_a_step_is_the_sum_that_the_docstring_says(calibration):
    one = ["model=xlstm_1b4", "training.sequence_length=4096", "training.micro_batch_size=4"]
    config, _, alone = step(calibration, 1, *one, "training.global_batch_size=4")
    _, plan, three = step(calibration, 1, *one, "training.global_batch_size=12")
    assert three.passes == pytest.approx(3 * alone.passes) and three.update == alone.update
    assert alone.communication == alone.pipeline == alone.recomputation == 0
    # A host that needs two fifths of the GPU's time is hardly waited for.
    assert 0 < alone.host < 0.01 * alone.passes
    assert three.total == pytest.approx(three.passes + three.host + three.update)
    assert plan.tokens_per_second_per_device == pytest.approx(3 * 16384 / three.total)
    assert plan.predicted_seconds == pytest.approx(1000 * three.total)
    # A model of 24 such blocks takes what 24 of the calibration's take.
    (rest, block) = _rest_and_block(calibration)
    copied = 14.0 * count_parameters(config.model).total / invented_gpu.COPY
    assert alone.passes == pytest.approx(24 * block + rest - copied, rel=0.01)


def _rest_and_block(calibration):
    flat, deep = (
        point.pass_seconds
        for point in calibration.steps
        if (point.model, point.execution, point.activation_checkpointing) == ("xlstm_1b4", COMPILED, "none")
    )
    block = (deep - flat) / 4
    return flat - 2 * block, block


def test_recomputation_costs_a_forward_pass_of_the_blocks(calibration):
    one = ["model=xlstm_1b4", "training.sequence_length=4096", "training.micro_batch_size=4"]
    one += ["training.global_batch_size=4"]
    _, _, none = step(calibration, 1, *one)
    for mode in ("unit", "block"):
        _, _, again = step(calibration, 1, *one, f"parallel.activation_checkpointing={mode}")
        assert again.passes == none.passes and 0.25 * none.passes < again.recomputation < 0.4 * none.passes


def test_a_small_model_waits_for_its_host_unless_its_launches_are_recorded(calibration):
    small = ["model=xlstm_400m", "training.sequence_length=2048", "training.global_batch_size=8"]
    _, _, recorded = step(calibration, 1, *small)
    _, _, compiled = step(calibration, 1, *small, "training.cuda_graphs=false")
    assert recorded.host < 0.05 * recorded.passes and compiled.host > 0.1 * compiled.passes
    block, rest = invented_gpu.HOST[COMPILED]
    # Longer than the host alone takes, since the GPU takes nearly as long.
    assert 1 < (compiled.passes + compiled.host) / (24 * block + rest) < 2 ** (1 / 6)


def test_stages_wait_as_the_formula_of_the_bubble_says(calibration):
    one = ["model=xlstm_7b", "training.sequence_length=8192", "training.micro_batch_size=1", "parallel.pipeline=2"]
    _, plan, few = step(calibration, 2, *one, "training.global_batch_size=4")
    _, _, many = step(calibration, 2, *one, "training.global_batch_size=16")
    assert plan.bubble == pytest.approx(1 / 5)
    # The slowest stage's unit, once more than there are micro-batches, and half of the stages' difference each time.
    unit = (many.total - few.total) / 12
    assert few.total - few.update == pytest.approx(5 * unit, rel=0.01)


def test_exchanges_take_the_bytes_that_they_move(calibration):
    one = ["model=xlstm_1b4", "training.sequence_length=4096", "training.micro_batch_size=4"]
    one += ["training.global_batch_size=32"]
    config, _, sharded = step(calibration, 8, *one)
    parameters = count_parameters(config.model).total
    links = Links.of(calibration, 1, 8, 400.0)
    assert sharded.communication == pytest.approx(
        2 * (LATENCY + 2 * parameters * 7 / 8 / links.inside) + LATENCY + 2 * parameters * 7 / 8 / links.inside
    )
    _, _, nothing = step(calibration, 1, *one)
    assert nothing.communication == 0
    _, _, far = step(calibration, 16, *one[:-1], "training.global_batch_size=64", nodes=16)
    assert far.communication > 2 * sharded.communication


def test_measured_collectives_replace_data_sheets():
    point = CollectivePoint("all_reduce", 1, 2, 2**30, 2**30 / 300e9)
    calibration = dataclasses.replace(invented_gpu.bare(), collectives=[point])
    links = Links.of(calibration, 1, 2, 400.0)
    assert links.inside_is_measured and links.inside == pytest.approx(300e9)
    assert links.reduce(2**30, 2) == pytest.approx(2 * LATENCY + point.seconds)
    assert not Links.of(calibration, 2, 16, 400.0).between_is_measured
    # A network of 400 Gbit/s for each of 8 GPUs, of which collectives reach 0.8.
    assert Links.of(calibration, 2, 16, 400.0).between == pytest.approx(320e9)
    assert Links.of(calibration, 2, 16, 100.0).between == pytest.approx(80e9)


def test_slices_of_a_sample_wait_for_each_other(calibration):
    one = ["model=xlstm_1b4", "training.micro_batch_size=1", "training.compile=false"]
    _, _, replicas = step(calibration, 2, *one, "training.sequence_length=16384", "training.global_batch_size=2")
    long = ["training.sequence_length=32768", "training.global_batch_size=1", "parallel.sequence=2"]
    _, _, slices = step(calibration, 2, *one, *long)
    assert slices.communication - replicas.communication == pytest.approx(34e-3, rel=0.01)
    # 91 to 94 % of the replicas' speed (benchmarks/results/2026-11-28-sequence-parallel.md).
    assert 0.85 < replicas.total / slices.total < 0.95


def test_time_chunks_run_forward_twice_but_for_the_last(calibration):
    one = ["model=xlstm_400m", "training.sequence_length=65536", "training.global_batch_size=1"]
    one += ["training.micro_batch_size=1"]
    _, _, whole = step(calibration, 1, *one, "training.compile=false", "parallel.activation_checkpointing=block")
    _, _, chunks = step(calibration, 1, *one, "training.compile=false", "training.time_chunk=8192")
    assert chunks.recomputation == pytest.approx(7 / 8 * whole.recomputation, rel=0.02)


def test_a_run_on_a_calibrated_gpu_prints_its_time_and_in_fp32_only_an_assumption():
    config = compose(RunConfig, "train", [*BASE, "model=xlstm_400m"])
    plan = make_plan(config, 8, "NVIDIA H200")
    assert plan.step_seconds is not None and plan.predicted_seconds == 1000 * plan.step_seconds.total
    (line,) = [line for line in plan.describe().splitlines() if line.startswith("time ")]
    assert (
        line.endswith("tokens/s a GPU (see python -m launch plan)")
        and f"{plan.step_seconds.total:.3f} s a step" in line
    )
    for other, device in ((["precision=fp32"], "NVIDIA H200"), ([], "NVIDIA A100-SXM4-80GB")):
        assumed = make_plan(compose(RunConfig, "train", [*BASE, "model=xlstm_400m", *other]), 8, device)
        assert assumed.step_seconds is None and "at 35% of" in assumed.describe()
