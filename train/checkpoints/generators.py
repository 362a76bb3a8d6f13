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


def read_generators(path: Path) -> dict[str, Any]:
    """What `generator_states` found, as JSON in a file: states that each kind of generator takes.

    Raises OSError, ValueError, KeyError, TypeError or RuntimeError where the file holds something else.
    """
    states = json.loads(path.read_bytes())
    version, internal, gauss_next = states["python"]
    python = (version, tuple(internal), gauss_next)
    random.Random().setstate(python)
    name, keys, position, has_gauss, cached = states["numpy"]
    numpy = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.RandomState().set_state(numpy)
    tensors = {
        kind: torch.frombuffer(bytearray(base64.b64decode(states[kind])), dtype=torch.uint8)
        for kind in ("torch", "cuda")
        if kind == "torch" or kind in states
    }
    torch.Generator().set_state(tensors["torch"])
    return {"python": python, "numpy": numpy, **tensors}


def restore_generators(path: Path, device: torch.device) -> None:
    """Set every generator of this process to what `generator_states` found, as JSON in a file."""
    states = read_generators(path)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
