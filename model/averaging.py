"""The average of several models' weights, such as of the last checkpoints of a run at a constant learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from model.loading import StoredModel
from model.stored import differences
from model.weights import save_fragments, write_model_json
from model.whole_tensors import SHARD_BYTES, into_shards, new_directory

AVERAGE_JSON = "average.json"


def misfits(sources: Sequence[StoredModel]) -> list[str]:
    """Why weights of `sources` cannot be averaged, one line each: models that compute something else than the first."""
    problems = []
    first = sources[0]
    for other in sources[1:]:
        differing = [f"{key} {one} and {two}" for key, (one, two) in differences(first.config, other.config).items()]
        if differing:
            problems.append(
                f"{first.located.weights} and {other.located.weights} are other models ({', '.join(differing)}); "
                "average checkpoints of one model"
            )
    return problems


def share_problems(shares: Sequence[float], count: int) -> list[str]:
    """Why `shares` cannot weigh `count` sources, one line each."""
    if len(shares) == count and all(map(math.isfinite, shares)) and sum(shares) > 0:
        return []
    shown = ",".join(f"{share:g}" for share in shares)
    return [f"weights: {shown} for {count} models; give one number for each, with commas between, of a positive sum"]


def average(sources: Sequence[StoredModel], output: str | Path, shares: Sequence[float] | None = None) -> None:
    """Write sum(share_i * weights_i) / sum(share_i), summed in float64, as a weights directory in float32.

    One parameter is in memory at a time, and at most SHARD_BYTES of the result. average.json says what it is made of.

    Args:
        sources: two or more, between which `misfits` finds nothing.
        output: must not exist yet, or be empty. Nothing is left there when writing fails.
        shares: one for each source, of any positive sum; None: all equal.

    Raises:
        ValueError: fewer than two sources, shares that do not fit, or a taken output directory.
        WeightsError: a file of a source cannot be read.
    """
    shares = [1.0] * len(sources) if shares is None else list(shares)
    if len(sources) < 2:
        raise ValueError("an average takes two sources or more")
    if problems := share_problems(shares, len(sources)):
        raise ValueError(*problems)
    assert not misfits(sources)
    shapes = sources[0].shapes
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    with new_directory(Path(output)) as partial:
        for number, names in enumerate(into_shards(sizes, SHARD_BYTES)):
            fragments = ((name, 0, _averaged(sources, name, shares)) for name in names)
            save_fragments(partial / f"weights-{number:05d}.safetensors", fragments, shapes)
        write_model_json(partial, sources[0].config)
        parts = [
            {"source": str(source.located.checkpoint or source.located.weights), "weight": share / sum(shares)}
            for source, share in zip(sources, shares, strict=True)
        ]
        document = {"format_version": 1, "sources": parts}
        (partial / AVERAGE_JSON).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _averaged(sources: Sequence[StoredModel], name: str, shares: Sequence[float]) -> torch.Tensor:
    """One flattened parameter of the average, float32."""
    numel = math.prod(sources[0].shapes[name])
    total = torch.zeros(numel, dtype=torch.float64)
    for source, share in zip(sources, shares, strict=True):
        total.add_(source.read_range(name, 0, numel).double(), alpha=share)
    return total.div_(sum(shares)).float()
