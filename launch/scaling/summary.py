"""What `sweep fit` prints: every coefficient and exponent with its interval, and what could not be fitted."""

from __future__ import annotations

from collections.abc import Sequence

from launch.scaling.compare import Comparison
from launch.scaling.fit import GroupFit
from launch.scaling.runs import RunTable


def as_lines(table: RunTable, fits: Sequence[GroupFit], comparisons: Sequence[Comparison]) -> list[str]:
    """For a reader, group by group; intervals of 95 % in brackets."""
    lines = [f"{len(table.used)} runs fitted, {len(table.excluded)} excluded; in brackets the 95 % intervals"]
    lines += [f"  excluded: {run.run}: {run.excluded}" for run in table.excluded]
    for fit in fits:
        lines += ["", f"{fit.group}: {len(fit.runs)} runs"]
        for axis, law in fit.isoflop.laws.items():
            letter = "N" if axis == "parameters" else "D"
            lines.append(f"  IsoFLOP             {letter}(C) ~ C^{law.exponent_interval().written('.4f')}")
        for loss_law in fit.model.loss_laws:
            figures = "  ".join(f"{name} {value.written('.4g')}" for name, value in loss_law.figures().items())
            lines.append(f"  {loss_law.name:19} {figures}")
        lines += [f"  note: {reason}" for reason in fit.not_fitted]
    if comparisons:
        lines += ["", "families at equal FLOPs: loss of the first less that of the second at their optima"]
    for found in comparisons:
        context = "" if found.context is None else f", context {found.context:,}"
        line = f"  {found.first} - {found.second}{context}, {found.budget:.3g} FLOPs: {found.gap.written('.4f')}"
        if found.compute_ratio is not None:
            line += f"; {found.second} has the loss of {found.first} at {found.compute_ratio.written('.3g')} of them"
        lines.append(line)
    return lines
