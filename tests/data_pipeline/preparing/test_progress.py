"""What is told while a preparation runs."""

from __future__ import annotations

import pytest

from data_pipeline.preparing import progress as progress_module
from data_pipeline.preparing.progress import METER_LENGTH, Meter, Progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that `time.monotonic` gives; not a terminal."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_share_rate_and_time_left_count_what_others_finish_too(clock):
    finished = {0}
    lines: list[str] = []
    numbers = [[0] * METER_LENGTH, [0] * METER_LENGTH]
    with Progress([10_000_000] * 4, lambda: finished, numbers, lines.append, shown=True) as progress:
        meters = [Meter(shared, progress.tick) for shared in numbers]
        clock[0] += 10
        meters[0].add_bytes(4_000_000)
        assert lines == []
        clock[0] += 10
        meters[1].add_bytes(6_000_000)
        meters[1].add_documents(3000, 1_500_000)
        assert lines == ["preparing: 50%, 1/4 units, 0.5 MB/s, 0.7 minutes left; 0 documents, 0.0M tokens"]
        finished.add(2)
        meters[1].end_unit()
        clock[0] += 20
        meters[0].add_bytes(0)
        assert lines[1] == "preparing: 60%, 2/4 units, 0.3 MB/s, 0.8 minutes left; 3,000 documents, 1.5M tokens"
        # A unit that was given up takes its bytes back; what is shown does not.
        meters[0].end_unit()
        clock[0] += 20
        meters[0].add_bytes(0)
        assert lines[2].startswith("preparing: 60%, 2/4 units")


def test_documents_are_counted_where_sizes_are_unknown_and_nothing_where_it_is_not_wanted(clock):
    for shown in (True, False):
        lines: list[str] = []
        numbers = [[0] * METER_LENGTH]
        with Progress([0, 0], set, numbers, lines.append, shown) as progress:
            clock[0] += 20
            Meter(numbers[0], progress.tick).add_documents(7, 700)
        assert lines == (["preparing: 7 documents, 0.0M tokens"] if shown else [])
