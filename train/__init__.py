"""The run: configuration, plan, mesh and engine, training loop, checkpoints, callbacks, evaluation.

From a notebook or a script:

    from train import train
    train(config)  # a RunConfig
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: `python -m train --help` does without torch.
    if name == "train":
        from train.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
