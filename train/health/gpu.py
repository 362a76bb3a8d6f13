"""Temperature, clocks, power and memory errors of a GPU, as NVIDIA's management library (NVML) has them."""

from __future__ import annotations

import importlib
import logging
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from train.health.config import HealthConfig

log = logging.getLogger(__name__)

# Reasons for lower clocks, as NVML numbers them. Those not named are usual: idle, or a limit of power that was set.
_HEAT, _SUPPLY = "heat", "its power supply"
_REASONS = {0x8: "its hardware", 0x20: _HEAT, 0x40: _HEAT, 0x80: _SUPPLY}
# Readings of one window.
_READINGS = 12


@dataclass(frozen=True)
class GpuReading:
    """Of one moment. None: what this GPU does not tell."""

    # Degrees Celsius, watts, megahertz.
    temperature: float | None
    power: float | None
    clock: float | None
    highest_clock: float | None
    # Why its clocks are lowered, in words.
    slowed_by: tuple[str, ...]
    # Errors in its memory since the driver was loaded.
    uncorrected_errors: int | None
    corrected_errors: int | None


@dataclass(frozen=True)
class GpuWindow:
    """What readings of some time have in common."""

    # Which window of the process it is, from 1.
    number: int
    # The highest; the mean; the highest.
    temperature: float | None
    power: float | None
    clock: float | None
    highest_clock: float | None
    # Of the readings, the share with lowered clocks, and why.
    slowed_share: float
    slowed_by: str
    # Since the process began.
    uncorrected_errors: int
    corrected_errors: int

    @classmethod
    def of(cls, number: int, readings: list[GpuReading], first: GpuReading) -> GpuWindow:
        """`first`: of the process."""
        slowed = [reading for reading in readings if reading.slowed_by]
        reasons = sorted({reason for reading in slowed for reason in reading.slowed_by})
        return cls(
            number=number,
            temperature=max(_told(reading.temperature for reading in readings), default=None),
            power=statistics.fmean(powers) if (powers := _told(reading.power for reading in readings)) else None,
            clock=max(_told(reading.clock for reading in readings), default=None),
            highest_clock=max(_told(reading.highest_clock for reading in readings), default=None),
            slowed_share=len(slowed) / len(readings),
            slowed_by=" and ".join(reasons),
            uncorrected_errors=(readings[-1].uncorrected_errors or 0) - (first.uncorrected_errors or 0),
            corrected_errors=(readings[-1].corrected_errors or 0) - (first.corrected_errors or 0),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> GpuWindow:
        return cls(**content)


def gpu_problems(window: GpuWindow, config: HealthConfig) -> dict[str, str]:
    """What is wrong with a GPU: kind -> words. Pure."""
    problems = {}
    if window.temperature is not None and window.temperature > config.gpu_temperature:
        problems["temperature"] = (
            f"is at {window.temperature:.0f} degrees Celsius, above health.gpu_temperature={config.gpu_temperature:g}"
        )
    if window.slowed_share > config.gpu_slowed_share:
        problems["slowed"] = (
            f"is slowed down by {window.slowed_by} {window.slowed_share:.0%} of the time, more than "
            f"health.gpu_slowed_share={config.gpu_slowed_share:g}"
        )
    if window.clock is not None and window.highest_clock:
        share = window.clock / window.highest_clock
        if share < config.gpu_clock_share:
            problems["clock"] = (
                f"runs at {window.clock:.0f} MHz of {window.highest_clock:.0f}, less than "
                f"health.gpu_clock_share={config.gpu_clock_share:g} of them"
            )
    if window.uncorrected_errors > 0:
        problems["uncorrected_errors"] = (
            f"has had {window.uncorrected_errors} errors in its memory that were not corrected"
        )
    if window.corrected_errors >= config.gpu_corrected_errors:
        problems["corrected_errors"] = (
            f"has had {window.corrected_errors} errors in its memory, all corrected; "
            f"health.gpu_corrected_errors={config.gpu_corrected_errors}"
        )
    return problems


def worst_of_host(windows: list[GpuWindow]) -> dict[str, float | None]:
    """The figures of a host's GPUs: of each the worst one's."""
    return {
        "gpu_temperature": max(_told(window.temperature for window in windows), default=None),
        "gpu_power": max(_told(window.power for window in windows), default=None),
        "gpu_clock": min(_told(window.clock for window in windows), default=None),
        "gpu_slowed_share": max(window.slowed_share for window in windows),
        "gpu_uncorrected_errors": max(window.uncorrected_errors for window in windows),
        "gpu_corrected_errors": max(window.corrected_errors for window in windows),
    }


def nvml_reader(device: torch.device) -> Callable[[], GpuReading] | None:
    """Reads one GPU; None where there is no GPU, no NVML, or none of its Python package."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        log.info("the health of GPUs is not watched: pip install nvidia-ml-py")
        return None
    try:
        nvml.nvmlInit()
        # The index of a device is another to NVML: it knows nothing of CUDA_VISIBLE_DEVICES.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError as error:
        log.warning("the health of this rank's GPU is not watched: %s", error)
        return None
    return lambda: _read(nvml, handle)


def _read(nvml: Any, handle: Any) -> GpuReading:
    def told(name: str, *arguments: Any) -> Any:
        """What this GPU, or this driver, does not tell is left out."""
        try:
            return getattr(nvml, name)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    power = told("nvmlDeviceGetPowerUsage")
    reasons = told("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return GpuReading(
        temperature=told("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        power=None if power is None else power / 1000,
        clock=told("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        highest_clock=told("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        slowed_by=tuple(dict.fromkeys(words for bit, words in _REASONS.items() if reasons & bit)),
        uncorrected_errors=told(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        corrected_errors=told(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
        ),
    )


class GpuWatch:
    """Reads a GPU again and again, in a thread of its own. `latest` is the last window, None before the first ends."""

    def __init__(self, read: Callable[[], GpuReading], window_seconds: float):
        self.latest: GpuWindow | None = None
        self._read = read
        self._pause = window_seconds / _READINGS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no more; what is being read is not waited for."""
        self._closing.set()

    def _watch(self) -> None:
        first, readings, number = self._read(), list[GpuReading](), 0
        while not self._closing.wait(self._pause):
            readings.append(self._read())
            if len(readings) == _READINGS:
                number += 1
                self.latest, readings = GpuWindow.of(number, readings, first), []


def _told(figures: Any) -> list[float]:
    return [figure for figure in figures if figure is not None]
