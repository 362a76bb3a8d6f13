"""How the benchmarks time: device events, cold caches, many input sets; and what the machine can do at best."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Several times the largest L2 cache (60 MB on an H200).
FLUSH_BYTES = 256 * 2**20
# torch.cuda._sleep counts cycles; no GPU here runs faster than this.
CYCLES_PER_SECOND = 2.0e9
LONGEST_SLEEP = 0.03


def measure(calls: list[Callable[[], object]], device: torch.device, seconds: float, *, hide_host: bool) -> dict:
    """Time calls that do the same work on different inputs, in turn, each from a cold L2 cache.

    Args:
        calls: the work, once per input set; already run once, so that everything is compiled.
        device: where they run; on a CPU the wall clock is read.
        seconds: about how long to go on. At least 5 and at most 100 iterations run, 20 where they fit in four times
            this.
        hide_host: keep the device busy with a pause until the host has issued the whole call, so that the result has
            device time alone. Otherwise a call that the host issues too slowly shows the host's time.

    Returns:
        median, low and high (10th and 90th percentile) in milliseconds, iterations.
    """
    for call in calls:
        call()
    _synchronize(device)
    began = time.perf_counter()
    calls[0]()
    issued = time.perf_counter() - began
    _synchronize(device)
    once = time.perf_counter() - began + 1e-4
    iterations = min(100, max(5, int(seconds / once), min(20, int(4 * seconds / once))))
    if device.type == "cuda":
        pause = int(CYCLES_PER_SECOND * min(1.5 * issued + 1e-4, LONGEST_SLEEP)) if hide_host else 0
        samples = _events(calls, device, iterations, pause)
    else:
        samples = _wall_clock(calls, iterations)
    ordered = sorted(samples)
    return {
        "median": ordered[len(ordered) // 2],
        "low": ordered[len(ordered) // 10],
        "high": ordered[len(ordered) - 1 - len(ordered) // 10],
        "iterations": iterations,
    }


def _events(calls: list[Callable[[], object]], device: torch.device, iterations: int, pause: int) -> list[float]:
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for number, (start, end) in enumerate(events):
        # Reading evicts as well as writing does, and leaves nothing to be written back within the timed part.
        flush.sum()
        if pause:
            torch.cuda._sleep(pause)
        start.record()
        calls[number % len(calls)]()
        end.record()
        # The queue of launches is finite: without this the host would block inside a timed call.
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _wall_clock(calls: list[Callable[[], object]], iterations: int) -> list[float]:
    samples = []
    for number in range(iterations):
        began = time.perf_counter()
        calls[number % len(calls)]()
        samples.append(1e3 * (time.perf_counter() - began))
    return samples


def measure_graph(call: Callable[[], object], device: torch.device, seconds: float) -> dict:
    """The same from replays of a CUDA graph of one call: no host time at all, not even gaps between launches."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the replays end, so that the memory of its results is not given away.
        results = call()
    times = measure([graph.replay], device, seconds, hide_host=True)
    del results
    return times


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """GiB that one call needs beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def ceilings(device: torch.device) -> dict[str, float]:
    """bytes_per_second (read + written) of a large copy and flops_per_second of a bf16 matrix product, measured."""
    elements, width = (2**30, 8192) if device.type == "cuda" else (2**22, 256)
    source = torch.randn(elements // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, 0.3, hide_host=True)["median"]
    a, b = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    product = measure([lambda: a @ b], device, 0.3, hide_host=True)["median"]
    return {
        "bytes_per_second": 2 * source.nbytes / (1e-3 * copy),
        "flops_per_second": 2 * width**3 / (1e-3 * product),
    }


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """Hardware, versions, commit, command and date of a run."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", "Triton's own"),
        "commit": commit or _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
