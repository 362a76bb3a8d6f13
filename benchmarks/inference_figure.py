"""The figure of benchmarks/inference.py: time and memory by length of the prompt, a line a contender and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Keys of a row, and what the panels call them.
PANELS = {
    "first": "to the first token, ms",
    "further": "a further token, ms",
    "gib": "memory, GiB",
}


def draw(rows: list[dict[str, Any]], size: str, path: Path) -> None:
    """Write the figure of the rows that have figures; nothing where none has."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "problem" not in row:
            lines.setdefault((row["contender"], row["batch"]), []).append(row)
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    contenders = list(dict.fromkeys(contender for contender, _ in lines))
    batches = sorted({batch for _, batch in lines})
    for (contender, batch), of_line in lines.items():
        of_line = sorted(of_line, key=lambda row: row["prompt"])
        for axis, key in zip(axes, PANELS, strict=True):
            axis.plot(
                [row["prompt"] for row in of_line],
                [row[key] for row in of_line],
                color=f"C{contenders.index(contender)}",
                linestyle=["-", "--", ":", "-."][batches.index(batch) % 4],
                marker="o",
                label=f"{contender}, batch {batch}",
            )
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="tokens of the prompt")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Generating text, {size}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
