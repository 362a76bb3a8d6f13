"""Is the order of `data_pipeline.ordering.order` random enough at SlimPajama's size? About two minutes on one core.

    python benchmarks/order_quality.py [--output benchmarks/results/DATE-order-quality.md]

n = 306,152,344: the samples of 2048 tokens in 627 billion. For every key the whole permutation is computed, and checked
to be one (every index once); pairs of neighbours in it are counted by 6 bits of each, low and high ones, in 4096 cells.
z = (chi-square - 4095) / sqrt(2 * 4095) should be within about 3 of zero; weak shuffles reach 25 to 34,000
(docs/data_internals.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.ordering.order import derive_key, permute  # noqa: E402

N = 306_152_344
CHUNK = 1 << 20
CELLS = 64 * 64


def quality(n: int, key: int) -> dict[str, float | bool]:
    """z of the serial pairs of the whole permutation, by kind, and whether it is a bijection."""
    seen = np.zeros(n, dtype=bool)
    cells = {name: np.zeros(CELLS, dtype=np.int64) for name in ("low", "high", "low, lag 2", "high, lag 2")}
    for begin in range(0, n, CHUNK):
        out = permute(np.arange(begin, min(n, begin + CHUNK)), n, key)
        seen[out] = True
        out = out[: len(out) // 4 * 4]
        for kind, six in (("low", out & 63), ("high", out * 64 // n)):
            cells[kind] += np.bincount(six[0::2] * 64 + six[1::2], minlength=CELLS)
            pairs = six.reshape(-1, 4)
            lagged = np.concatenate((pairs[:, 0] * 64 + pairs[:, 2], pairs[:, 1] * 64 + pairs[:, 3]))
            cells[f"{kind}, lag 2"] += np.bincount(lagged, minlength=CELLS)
    result: dict[str, float | bool] = {"bijective": bool(seen.all())}
    for name, counted in cells.items():
        # Which six high bits are how frequent follows from n alone, to less than one in four million.
        expected = counted.sum() / CELLS
        chi_square = float(((counted - expected) ** 2 / expected).sum())
        result[name] = (chi_square - (CELLS - 1)) / np.sqrt(2 * (CELLS - 1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"# Quality of the order at n = {N:,}",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}; command: python {' '.join(sys.argv)}",
        "",
        "z of the chi-square of serial pairs, 6 bits each, over the whole permutation.",
        "",
        "| key | every index once | low bits | high bits | low, lag 2 | high, lag 2 | ns an index |",
        "|---|---|---|---|---|---|---|",
    ]
    for number in range(options.keys):
        started = time.process_time()
        found = quality(N, derive_key(number, "quality"))
        nanoseconds = (time.process_time() - started) / N * 1e9
        figures = " | ".join(f"{found[name]:+.2f}" for name in ("low", "high", "low, lag 2", "high, lag 2"))
        lines.append(f"| {number} | {'yes' if found['bijective'] else 'NO'} | {figures} | {nanoseconds:.0f} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
