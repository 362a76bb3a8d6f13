"""What runs have become: one run as a picture, several compared on a page (`python -m train.report`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.report.command import main
    from train.report.run_picture import draw_report

__all__ = ["draw_report", "main"]
_MODULES = {"draw_report": "train.report.run_picture", "main": "train.report.command"}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the command line answers an interrupt before torch and matplotlib are there.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
