"""Rows of a kernel benchmark as a Markdown table and a figure."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.cases import Case, MLSTMCase
from benchmarks.peers import Contender

CHUNKS = (128, 256)


def table(environment: dict, ceilings: dict, cases: list[Case], contenders: list[Contender], rows: list[dict]) -> str:
    """Everything in Markdown: the machine, then one table for each case.

    Args:
        environment: of benchmarks.timing.
        ceilings: of benchmarks.timing; empty if they could not be measured.
        cases, contenders: in the order of the tables.
        rows: of benchmarks.worker.
    """
    by_key = {(row["case"], row["contender"]): row for row in rows}
    lines = ["# Kernels", ""] + [f"- {name}: {value}" for name, value in environment.items()]
    if ceilings:
        copy, matrix = ceilings["bytes_per_second"] / 1e12, ceilings["flops_per_second"] / 1e12
        lines.append(f"- ceilings in this run: copy {copy:.2f} TB/s, bf16 matrix product {matrix:.0f} TFLOP/s")
    lines += [
        "",
        "Milliseconds: median (10th to 90th percentile), device time, L2 cold. Ratio: its time over that of ours of",
        "the same kind. GiB: beyond inputs, forward + backward. Error: relative, worst gradient named.",
    ]
    for case in cases:
        lines += ["", f"## {case.title}", "", *_floors(case, ceilings, by_key)]
        lines += [
            "| | forward | ratio | forward + backward | ratio | GiB | error h | error gradients | |",
            "|---" * 9 + "|",
        ]
        for contender in contenders:
            row = by_key.get((case.name, contender.name))
            if row is not None:
                lines.append(_line(contender, row, by_key.get((case.name, contender.compare_with))))
        lines += _host(case, contenders, by_key)
    return "\n".join(lines) + "\n"


def _line(contender: Contender, row: dict, ours: dict | None) -> str:
    cells = [contender.name]
    for part in ("forward", "both"):
        cells += [_times(row.get(part)), _ratio(row.get(part), (ours or {}).get(part))]
    memory = row.get("both_memory")
    cells.append("" if memory is None else f"{memory:.2f}")
    found = dict(row.get("errors") or {})
    h = found.pop("h", None)
    cells.append("" if h is None else f"{h:.1e}")
    # NaN first: it is worse than any number.
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name], default=None)
    cells.append("" if worst is None else f"{worst} {found[worst]:.1e}")
    cells.append("; ".join(text for text in (contender.note, row.get("failure", "")) if text).replace("|", "/"))
    return "| " + " | ".join(cells) + " |"


def _times(times: dict | None) -> str:
    return "" if times is None else f"{times['median']:.3f} ({times['low']:.3f}-{times['high']:.3f})"


def _ratio(times: dict | None, ours: dict | None) -> str:
    return f"{times['median'] / ours['median']:.2f}" if times and ours else ""


def _floors(case: Case, ceilings: dict, by_key: dict) -> list[str]:
    if not isinstance(case, MLSTMCase):
        row = by_key.get((case.name, "ours_slstm"), {})
        if "both" not in row:
            return []
        forward, both = (1e3 * row[part]["median"] / case.length for part in ("forward", "both"))
        return [f"Ours per time step: {forward:.2f} us forward, {both:.2f} us forward + backward.", ""]
    if not ceilings:
        return []
    ours = by_key.get((case.name, "ours"), {})
    texts = []
    for chunk in CHUNKS:
        floor = case.floors(ceilings["bytes_per_second"], ceilings["flops_per_second"], chunk)
        text = f"L={chunk}: {floor['forward']:.3f} / {floor['both']:.3f} ms"
        if "both" in ours:
            shares = (f"{floor[part] / ours[part]['median']:.0%}" for part in ("forward", "both"))
            text += f" (ours reaches {' / '.join(shares)})"
        texts.append(text)
    return [f"Floor, forward / forward + backward, {'; '.join(texts)}.", ""]


def _host(case: Case, contenders: list[Contender], by_key: dict) -> list[str]:
    """A second table where host time was measured too."""
    lines = []
    for contender in contenders:
        row = by_key.get((case.name, contender.name), {})
        if "forward_with_host" in row:
            cells = [_times(row.get(f"{part}_{how}")) for how in ("with_host", "graph") for part in ("forward", "both")]
            failure = row.get("both_graph_failure", row.get("forward_graph_failure", "")).replace("|", "/")
            lines.append(f"| {' | '.join([contender.name, *cells, failure])} |")
    head = (
        "| | forward, host in | forward + backward, host in | forward, CUDA graph | forward + backward, CUDA graph | |"
    )
    return ["", head, "|---" * 6 + "|", *lines] if lines else []


def draw(path: Path, title: str, cases: list[Case], contenders: list[Contender], rows: list[dict]) -> None:
    """One panel of bars for each case: forward, and forward + backward, of everything that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_key = {(row["case"], row["contender"]): row for row in rows if "both" in row}
    shown = [case for case in cases if any((case.name, c.name) in by_key for c in contenders)]
    if not shown:
        return
    size = (8, 2.6 * len(shown))
    figure, panels = pyplot.subplots(len(shown), 1, figsize=size, squeeze=False, layout="constrained")
    for case, panel in zip(shown, panels[:, 0], strict=True):
        names = [c.name for c in contenders if (case.name, c.name) in by_key]
        for offset, part, label in ((-0.2, "forward", "forward"), (0.2, "both", "forward + backward")):
            times = [by_key[case.name, name][part]["median"] for name in names]
            bars = panel.barh([y + offset for y in range(len(names))], times, 0.4, label=label)
            panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.set_title(case.title, fontsize=9)
        panel.set_xlabel("ms", fontsize=8)
        panel.margins(x=0.12)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9, wrap=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
