"""What the tests of kernels share: how results are compared, and where documents start. B batch, S sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN, which no tolerance admits, if either holds one."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    expected = expected.detach().double()
    difference = actual.detach().double().to(expected.device) - expected
    return (difference.norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | dict[str, float]) -> None:
    """Every tensor within the tolerance (one for all, or one for each name) of the expected one, all failures named."""
    assert actual.keys() == expected.keys()
    failures = []
    for name, reference in expected.items():
        limit = tolerance[name] if isinstance(tolerance, dict) else tolerance
        error = relative_error(actual[name], reference)
        if not error <= limit:
            failures.append(f"{name}: relative error {error:.1e} > {limit:.0e}")
    assert not failures, "; ".join(failures)


def starts_at(
    positions: list[int] | None, batch: int, length: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """[B, S] bool, True at the positions of the first row, in the second one token later, so that rows differ."""
    if positions is None:
        return None
    starts = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(min(batch, 2)):
        starts[row, [p + row for p in positions if p + row < length]] = True
    return starts.to(device)
