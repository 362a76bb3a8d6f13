"""`python -m train` that stands still after a step: `python -m tests.paused_train STEP FILE OVERRIDE...`.

When the metrics of STEP are on disk, rank 0 goes on only once FILE exists. What a test does to a run in the middle, it
does before the run's end, however late the test comes to it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from train.__main__ import end_process, main
from train.callbacks.metrics_file import MetricsFile


def pause_at(step: int, file: Path) -> None:
    """Let rank 0 wait for `file` after it wrote the metrics of `step`."""
    on_metrics = MetricsFile.on_metrics

    def pausing(self: MetricsFile, trainer: Any, record: dict[str, Any]) -> None:
        on_metrics(self, trainer, record)
        while record["step"] == step and not file.exists():
            time.sleep(0.01)

    MetricsFile.on_metrics = pausing


if __name__ == "__main__":
    pause_at(int(sys.argv[1]), Path(sys.argv[2]))
    end_process(main(sys.argv[3:]))
