"""A GPU that is hot, slowed down or has memory errors is told of; a healthy one is not."""

import json
import time
from dataclasses import replace

import pytest
import torch

from tests.documented import quoted
from tests.runs import ROOT
from train.health.config import HealthConfig, validate_health
from train.health.gpu import GpuReading, GpuWatch, GpuWindow, gpu_problems, nvml_reader, worst_of_host
from train.health.record import health_figures

CONFIG = HealthConfig()
# As of an H200 under load, its power at its limit.
HEALTHY = GpuReading(64, 690.0, 1500, 1980, (), 0, 2)


def window(*readings, first=HEALTHY):
    return GpuWindow.of(1, list(readings), first)


def test_a_healthy_gpu_is_not_told_of():
    assert gpu_problems(window(*[HEALTHY] * 12), CONFIG) == {}
    # Nor one that tells nothing, nor for errors of the time before the run.
    silent = GpuReading(None, None, None, None, (), None, None)
    assert gpu_problems(window(silent, first=silent), CONFIG) == {}
    worn = replace(HEALTHY, uncorrected_errors=3, corrected_errors=10**6)
    assert gpu_problems(window(worn, worn, first=worn), CONFIG) == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"temperature": 88}, "temperature", "is at 88 degrees Celsius, above health.gpu_temperature=85"),
        (
            {"slowed_by": ("heat",)},
            "slowed",
            "is slowed down by heat 50% of the time, more than health.gpu_slowed_share=0.1",
        ),
        (
            {"uncorrected_errors": 2},
            "uncorrected_errors",
            "has had 2 errors in its memory that were not corrected",
        ),
        (
            {"corrected_errors": 1002},
            "corrected_errors",
            "has had 1000 errors in its memory, all corrected; health.gpu_corrected_errors=1000",
        ),
    ],
)
def test_what_is_wrong_with_a_gpu(change, kind, words):
    assert gpu_problems(window(HEALTHY, replace(HEALTHY, **change)), CONFIG) == {kind: words}


def test_a_clock_is_low_only_where_it_is_never_higher():
    low = replace(HEALTHY, clock=345)
    assert gpu_problems(window(low, HEALTHY), CONFIG) == {}
    assert gpu_problems(window(low, low), CONFIG) == {
        "clock": "runs at 345 MHz of 1980, less than health.gpu_clock_share=0.5 of them"
    }


def test_figures_of_a_host_are_those_of_its_worst_gpu():
    cool, hot = window(HEALTHY), window(replace(HEALTHY, temperature=80, clock=1200, uncorrected_errors=1))
    figures = worst_of_host([cool, hot])
    assert (figures["gpu_temperature"], figures["gpu_clock"], figures["gpu_uncorrected_errors"]) == (80, 1200, 1)
    page = (ROOT / "docs" / "guides" / "monitors.md").read_text(encoding="utf-8").splitlines()
    assert set(figures) <= {name for line in page for name in quoted(line)}
    record = {"lag_seconds": None, "slowest_host": "n1", "slowest_rank": 3, "hosts": {"n1": figures}}
    assert health_figures(record)["health/n1/gpu_temperature"] == 80
    assert "health/lag_seconds" not in health_figures(record)


def test_a_window_is_posted_as_it_is():
    found = window(HEALTHY, replace(HEALTHY, slowed_by=("heat", "its power supply")))
    assert found.slowed_by == "heat and its power supply"
    assert GpuWindow.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_without_a_gpu_nothing_is_read():
    assert nvml_reader(torch.device("cpu")) is None


def test_settings_that_make_no_sense_are_named_all_at_once():
    assert validate_health(CONFIG, "health") == [] and validate_health(replace(CONFIG, window_seconds=None), "h") == []
    wrong = HealthConfig(0, 0, 0, -1, 1, 0, 0, 2, -0.5, 0)
    assert [line.partition(":")[0] for line in validate_health(wrong, "health")] == [
        f"health.{name}"
        for name in (
            "straggler_windows",
            "window_seconds",
            "straggler_share",
            "slow_save_share",
            "gpu_temperature",
            "gpu_slowed_share",
            "gpu_clock_share",
            "slow_save_seconds",
            "slow_save_factor",
            "gpu_corrected_errors",
        )
    ]


def test_readings_come_from_a_thread_that_ends():
    readings = iter([HEALTHY] * 100_000)
    watch = GpuWatch(lambda: next(readings), 0.12)
    deadline = time.monotonic() + 60
    while (found := watch.latest) is None or found.number < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found.temperature == 64 and found.slowed_share == 0
    watch.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_read_through_nvml():
    pytest.importorskip("pynvml")
    read = nvml_reader(torch.device("cuda", 0))
    assert read is not None
    begun = time.perf_counter()
    reading = read()
    assert time.perf_counter() - begun < 1
    assert 10 < reading.temperature < 100 and 10 < reading.power < 2000
    assert 0 < reading.clock <= reading.highest_clock
    assert reading.uncorrected_errors in (0, None)
    assert gpu_problems(window(reading, first=reading), replace(CONFIG, gpu_clock_share=0.0)) == {}
