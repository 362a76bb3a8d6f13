"""Figures of a line `health`, under the names that rules of alerts, W&B and TensorBoard have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def health_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """health/lag_seconds, health/HOST/gpu_temperature and so on, without what is not known."""
    figures = {f"health/{key}": value for key, value in record.items() if isinstance(value, int | float)}
    for host, of_host in record["hosts"].items():
        figures |= {f"health/{host}/{key}": value for key, value in of_host.items() if value is not None}
    return figures
