"""The random generators of a rank: seeded, saved, restored."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator of this process. Nothing in the training step draws from them today; dropout would."""
    for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
        seed_generator((seed * 1_000_003 + rank) % 2**32)


def _python_generator_state() -> list[Any]:
    version, internal, gauss_next = random.getstate()
    return [version, list(internal), gauss_next]


def generator_states(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process, as JSON values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    states = {
        "python": _python_generator_state(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if device.type == "cuda":
        states["cuda"] = base64.b64encode(torch.cuda.get_rng_state(device).numpy().tobytes()).decode()
    return states


def restore_generators(path: Path, device: torch.device) -> None:
    """Set every generator of this process to what `generator_states` found, as JSON in a file."""
    states = json.loads(path.read_text(encoding="utf-8"))

    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(tensor(states["cuda"]), device)
