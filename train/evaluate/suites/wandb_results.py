"""What a suite found, at Weights & Biases: in the summary of the run that the model is of."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from conf.passwords import without_passwords
from train.callbacks.wandb_logger import ID_FILE
from train.config import WandbConfig
from train.wandb_settings import reach_seconds, wandb_mode


def send_to_wandb(run: Path, settings: WandbConfig, line: dict[str, Any]) -> None:
    """Put the figures of a line of evaluations.jsonl into the summary of the run in folder `run`.

    Of a run that W&B does not know nothing is sent. What W&B cannot do is told; the line is in the run's folder.
    """
    mode, file = wandb_mode(settings, os.environ), run / ID_FILE
    if mode == "disabled" or not file.is_file():
        return
    import wandb

    known = wandb.Settings(silent=True, console="off", init_timeout=reach_seconds(os.environ))
    if without_passwords(sys.argv) != sys.argv:
        # With what the machine is, W&B would keep the command line.
        known.x_disable_machine_info = True
    try:
        with wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=file.read_text(encoding="utf-8").strip(),
            # An offline part cannot ask the server for the run's past; the id alone ties the parts together.
            resume="allow" if mode == "online" else None,
            mode="online" if mode == "online" else "offline",
            dir=str(run),
            settings=known,
        ) as session:
            # Not a row of the history: a row has its place among those of training, and the run may yet go on.
            session.summary.update(figures(line))
    # W&B hands on whatever its service process or the network raised.
    except Exception as error:
        print(
            f"W&B has failed ({type(error).__name__}: {error}); {run / 'evaluations.jsonl'} has the result",
            file=sys.stderr,
        )


def figures(line: dict[str, Any]) -> dict[str, float]:
    """Name at W&B -> number: suite/<suite>/<case>/<figure>, and the step that was scored."""
    prefix = f"suite/{line['suite']}"
    found = {
        f"{prefix}/{case}/{name}": value
        for case, result in line["results"].items()
        for name, value in result.items()
        if value is not None
    }
    return found if line["step"] is None else {**found, f"{prefix}/step": line["step"]}
