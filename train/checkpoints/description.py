"""What a checkpoint holds, for `python -m train.checkpoint describe`. Nothing of its tensors is read."""

from __future__ import annotations

import math
import time
from typing import Any

from model.locate import Located
from model.marker import COMPLETE, FORMAT_VERSION, read_marker
from model.weights import WeightsReader
from train.checkpoints.layout import is_kept
from train.checkpoints.state import TrainState, read_state
from train.parallel.fragments import MOMENTS

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def describe(located: Located) -> dict[str, Any]:
    """The checkpoint that was found, as JSON values.

    Raises MarkerError, CheckpointError or WeightsError where it cannot be read.
    """
    folder = located.checkpoint
    assert folder is not None, located
    marker, state = read_marker(folder), read_state(folder)
    weights = WeightsReader(folder / "weights")
    sizes = {name: int(entry["bytes"]) for name, entry in sorted(marker.files.items())}
    of_weights = sum(size for name, size in sizes.items() if name.startswith("weights/"))
    of_optimizer = sum(size for name, size in sizes.items() if name.split("/")[0] in MOMENTS)
    total = sum(sizes.values())
    return {
        "checkpoint": str(folder),
        "run": None if located.run is None else str(located.run),
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((folder / COMPLETE).stat().st_mtime)),
        "format_version": FORMAT_VERSION,
        "attempt": marker.attempt,
        "kept": is_kept(folder),
        "step": state.step,
        "applied_steps": state.applied_steps,
        "skipped_steps": state.skipped_steps,
        "tokens": state.tokens,
        "parameters": sum(math.prod(shape) for shape in weights.shapes.values()),
        "dtype": ", ".join(sorted(_DTYPES[dtype] for dtype in weights.dtypes)),
        "layout": _layout(state),
        "data": {"next_sample": state.next_sample, **state.data_identity},
        "bytes": {
            "total": total,
            "weights": of_weights,
            "optimizer": of_optimizer,
            "rest": total - of_weights - of_optimizer,
        },
        "files": sizes,
    }


def _layout(state: TrainState) -> dict[str, int | None]:
    """How the run was laid out that wrote it; null where that is not known, as of version 0.2.0 without a run."""
    parallel = state.configuration.get("parallel")
    parallel = parallel if isinstance(parallel, dict) else {}
    pipeline, sequence = (_positive(parallel.get(key)) for key in ("pipeline", "sequence"))
    return {
        "world_size": state.world_size,
        "zero_stage": state.zero_stage,
        "pipeline": pipeline,
        "sequence": sequence,
        "data": None if pipeline is None or sequence is None else state.world_size // (pipeline * sequence),
    }


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def as_lines(description: dict[str, Any]) -> str:
    """The description for a reader; its files are counted."""
    layout, data, sizes = description["layout"], description["data"], description["bytes"]

    def known(value: object) -> str:
        return "not known" if value is None else str(value)

    def mib(kind: str) -> str:
        return f"{sizes[kind] / 2**20:,.1f} MiB"

    identity = ", ".join(f"{key} {data[key]}" for key in ("split", "sequence_length", "seed") if key in data)
    kept = ", kept for good" if description["kept"] else ""
    processes = f"{layout['world_size']} process{'es' * (layout['world_size'] != 1)}"
    lines = {
        "checkpoint": description["checkpoint"],
        "saved": f"{description['saved']}, by attempt {known(description['attempt'])}{kept}",
        "format": f"version {description['format_version']}",
        "progress": f"{description['step']:,} steps ({description['skipped_steps']:,} skipped), "
        f"{description['tokens']:,} tokens",
        "parameters": f"{description['parameters']:,} in {description['dtype']}",
        "written by": f"{processes}: ZeRO stage {layout['zero_stage']}, pipeline "
        f"{known(layout['pipeline'])}, sequence {known(layout['sequence'])}, data {known(layout['data'])}",
        "data": f"next sample {data['next_sample']:,}{f' ({identity})' if identity else ''}",
        "size": f"{mib('total')} in {len(description['files'])} files: weights {mib('weights')}, optimizer "
        f"{mib('optimizer')}, rest {mib('rest')}",
    }
    return "\n".join(f"{key:<11} {value}" for key, value in lines.items())
