"""How long single operations take on a calibrated GPU, for shapes between and beside those that were measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from kernels.attention import keys_per_query
from model.layers.base import CellForm
from train.estimate.calibration import Calibration, CellPoint, ProductPoint

# Rows x heads x width of an sLSTM up to which one more row takes no more time: what fills an H100 or H200
# (benchmarks/results/2026-11-24-slstm.md).
_SLSTM_ROOM = 64 * 1024
# Tokens of a chunk in whose products the mLSTM's time is counted.
_CHUNK = 128
# Of the products' rate, what a cell that was not measured is taken to reach.
_UNMEASURED_CELL = 0.2


class Rates:
    """Seconds of operations by a calibration."""

    def __init__(self, calibration: Calibration):
        self.bytes_per_second = calibration.copy_bytes_per_second
        self._products = _Grid(calibration.products)
        self._cells = calibration.cells

    def products(self, tokens: int, inputs: int, outputs: int) -> float:
        """The forward product of a dense layer in bf16; each of the two backward products takes as long."""
        moved = 2.0 * (tokens * (inputs + outputs) + inputs * outputs)
        rate = self._products.flops_per_second(tokens, math.sqrt(inputs * outputs))
        return max(2.0 * tokens * inputs * outputs / rate, moved / self.bytes_per_second)

    def moving(self, count: float) -> float:
        """Reading and writing so many bytes in all."""
        return count / self.bytes_per_second

    def cell(self, form: CellForm, batch: int, length: int) -> tuple[float, float]:
        """Forward, and forward and backward, of a cell over `batch` sequences of `length` tokens."""
        work = _cell_work(form, batch, length)
        points = [point for point in self._cells if point.kind == form.kind]
        if not points:
            rate = _UNMEASURED_CELL * self._products.flops_per_second(batch * length, form.heads * form.value_dim)
            forward = 2.0 * work / rate
            return forward, 3.0 * forward
        nearest = min(points, key=lambda point: _distance(point, form, batch, length))
        scale = work / _cell_work(_form(nearest), nearest.batch, nearest.length)
        return nearest.forward_seconds * scale, nearest.both_seconds * scale


class _Grid:
    """Rates of products over tokens and widths, linear in their logarithms between measured ones; beyond, the last."""

    def __init__(self, points: Sequence[ProductPoint]):
        self._of_width: dict[int, list[ProductPoint]] = {}
        for point in sorted(points, key=lambda point: point.tokens):
            self._of_width.setdefault(point.width, []).append(point)
        self._widths = sorted(self._of_width)

    def flops_per_second(self, tokens: int, width: float) -> float:
        of_widths = [
            math.log(
                _between(
                    [point.tokens for point in self._of_width[known]],
                    [math.log(point.flops_per_second) for point in self._of_width[known]],
                    tokens,
                )
            )
            for known in self._widths
        ]
        return _between(self._widths, of_widths, width)


def _between(places: Sequence[float], logarithms: Sequence[float], place: float) -> float:
    """The exponential of what lies at `place`, `logarithms` at `places` being given, in ascending order."""
    behind = bisect.bisect_left(places, place)
    if behind in (0, len(places)):
        return math.exp(logarithms[min(behind, len(places) - 1)])
    low, high = math.log(places[behind - 1]), math.log(places[behind])
    share = (math.log(place) - low) / (high - low)
    return math.exp(logarithms[behind - 1] * (1 - share) + logarithms[behind] * share)


def _form(point: CellPoint) -> CellForm:
    return CellForm(point.kind, point.heads, point.key_dim, point.value_dim)


def _cell_work(form: CellForm, batch: int, length: int) -> float:
    """What the time of a cell of its kind grows with."""
    key_dim, value_dim = form.key_dim, form.value_dim
    if form.kind == "slstm":
        # One token after another, of all rows and heads at once while there is room.
        return length * max(1.0, batch * form.heads * value_dim / _SLSTM_ROOM)
    if form.kind == "attention":
        return batch * form.heads * float(length) * keys_per_query(length, form.window) * value_dim
    return batch * length * form.heads * (4.0 * key_dim * value_dim + _CHUNK * (key_dim + value_dim))


def _distance(point: CellPoint, form: CellForm, batch: int, length: int) -> float:
    """How unlike two cells are: widths of heads count most, then how much there is to do at once."""
    widths = abs(math.log2(point.key_dim / form.key_dim)) + abs(math.log2(point.value_dim / form.value_dim))
    amount = math.log2(point.batch * point.length * point.heads / (batch * length * form.heads))
    return widths + 0.25 * abs(amount)
