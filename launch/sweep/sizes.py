"""From a size of the ladder to a model, and from the measures of a run to its rate and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from launch.sweep.config import RuleConfig, ShapeConfig, SizeConfig
from launch.sweep.settings import replaced
from model.accounting import count_parameters
from model.config import ModelConfig, validate_model
from model.layers import base

# How far a ladder by parameters may miss a size before it is refused.
_TOLERANCE = 1.15
# Of two models as near to the number of parameters, the one nearer to the aspect ratio is better: what a factor in the
# aspect ratio weighs against the same factor in parameters.
_WEIGHT_OF_ASPECT = 0.1


@dataclass(frozen=True)
class Measures:
    """What rules may depend on."""

    parameters: float
    non_embedding: float
    d_model: float
    # Of the whole run.
    flops: float = math.nan


def measures_of(model: ModelConfig) -> Measures:
    """Those of a model alone."""
    counted = count_parameters(model)
    without = counted.total - counted.groups.get(base.EMBEDDING, 0) - counted.groups.get(base.HEAD, 0)
    return Measures(float(counted.total), float(without), float(model.d_model))


def rule_value(rule: RuleConfig, measures: Measures) -> float:
    """value * (measure / at)^exponent, within its limits."""
    value = rule.value * (getattr(measures, rule.by) / rule.at) ** rule.exponent
    value = value if rule.least is None else max(rule.least, value)
    return value if rule.most is None else min(rule.most, value)


def settings_of_size(model: ModelConfig, size: SizeConfig, shape: ShapeConfig) -> dict[str, Any]:
    """The settings, by keys of a model, that give `model` the size; {} for a preset.

    Raises ValueError where no model of the shape comes near to the size.
    """
    if size.preset is not None:
        return {}
    if size.d_model is not None and size.n_blocks is not None:
        return scaled(model, size.d_model, size.n_blocks, shape)
    assert size.parameters is not None
    wanted = size.parameters
    found = sorted(_candidates(model, wanted, shape), key=lambda one: one.distance)
    best = next((one for one in found if not validate_model(one.model)), None)
    if best is None:
        raise ValueError(f"no model of about {wanted:,.0f} parameters is possible; change sweep.shape")
    if not 1 / _TOLERANCE < (ratio := best.parameters / wanted) < _TOLERANCE:
        raise ValueError(
            f"the model nearest to {wanted:,.0f} parameters has {best.parameters:,}, a factor of {ratio:.2f}; choose "
            "another size, or change sweep.shape"
        )
    return scaled(model, best.model.d_model, best.model.n_blocks, shape)


class _Candidate(NamedTuple):
    model: ModelConfig
    parameters: int
    # From what is wanted.
    distance: float


def _candidates(model: ModelConfig, wanted: float, shape: ShapeConfig) -> Iterator[_Candidate]:
    """Models around the aspect ratio, up to the first width that is too large at the least depth."""
    width, smallest = shape.multiple_of, 0
    while smallest < wanted * _TOLERANCE:
        # From half to twice the aspect ratio, the deepest first: where that is too small, the others are.
        for factor in (2.0, 1.4, 1.0, 0.7, 0.5):
            depth = max(1, math.floor(width / shape.aspect * factor))
            made = replaced(model, scaled(model, width, depth, shape))
            smallest = count_parameters(made).total
            aspect = abs(math.log(width / depth / shape.aspect))
            yield _Candidate(made, smallest, abs(math.log(smallest / wanted)) + _WEIGHT_OF_ASPECT * aspect)
            if smallest * _TOLERANCE < wanted:
                break
        width += shape.multiple_of


def scaled(model: ModelConfig, d_model: int, n_blocks: int, shape: ShapeConfig) -> dict[str, Any]:
    """The settings that make `model` so wide and deep, with heads of the same width and as many blocks of each kind."""
    settings: dict[str, Any] = {"d_model": d_model, "n_blocks": n_blocks}
    if model.ffn_dim is not None:
        ratio = shape.feed_forward or model.ffn_dim / model.d_model
        settings["ffn_dim"] = math.ceil(round(ratio * d_model, 6) / shape.multiple_of) * shape.multiple_of
    for kind, positions in {"slstm": model.slstm_at, "attention": model.attention_at}.items():
        if positions:
            settings[f"{kind}_at"] = scaled_positions(positions, model.n_blocks, n_blocks)
    for kind, positions in model.other_at.items():
        settings[f"other_at.{kind}"] = scaled_positions(positions, model.n_blocks, n_blocks)
    own = {name: getattr(model, name) for name in ("mlstm", "preup_mlstm", "slstm", "attention")}
    sections = {name: asdict(section) for name, section in own.items() if section is not None}
    for name, section in _with_heads({**sections, "layers": model.layers}):
        heads = _heads(d_model, shape.head_width or model.d_model / section["n_heads"])
        settings[f"{name}.n_heads"] = heads
        if "n_kv_heads" in section:
            settings[f"{name}.n_kv_heads"] = max(1, heads * section["n_kv_heads"] // section["n_heads"])
    return settings


def _with_heads(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, section) of those, and of the sections in them, that say how many heads a layer has."""
    for name, section in sections.items():
        if isinstance(section, Mapping):
            if "n_heads" in section:
                yield f"{prefix}{name}", section
            yield from _with_heads(section, f"{prefix}{name}.")


def _heads(d_model: int, width: float) -> int:
    """The number of heads whose width is nearest to `width`, as a factor."""
    fitting = [heads for heads in range(1, d_model + 1) if d_model % heads == 0]
    return min(fitting, key=lambda heads: abs(math.log(d_model / heads / width)))


def scaled_positions(positions: Sequence[int], blocks: int, wanted: int) -> list[int]:
    """Positions among `blocks` blocks as they are among `wanted`: as large a share, at least one, and spread alike."""
    count = max(1, round(len(positions) * wanted / blocks))
    # Place by rank: 0 at the first block's edge, the centres of the old ones, 1 at the last block's.
    ranks = [-0.5, *range(len(positions)), len(positions) - 0.5]
    places = [0.0, *((position + 0.5) / blocks for position in sorted(positions)), 1.0]
    new_ranks = [(number + 0.5) * len(positions) / count - 0.5 for number in range(count)]
    return sorted({math.floor(wanted * float(place)) for place in np.interp(new_ranks, ranks, places)})


def short(number: float) -> str:
    """A count with three digits, for names: 5.12m, 163m, 1.42b."""
    for factor, unit in ((1e9, "b"), (1e6, "m"), (1e3, "k")):
        if number >= factor:
            return f"{float(f'{number / factor:.3g}'):g}{unit}"
    return f"{float(f'{number:.3g}'):g}"
