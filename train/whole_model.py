"""The model with all of its weights on one rank, whatever the engine has cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from model.accounting import parameter_shapes
from model.language_model import LanguageModel
from model.loading import empty_model
from train.config import RunConfig
from train.parallel.engine import Engine


@contextlib.contextmanager
def whole_model(engine: Engine, config: RunConfig) -> Iterator[LanguageModel | None]:
    """The model of `engine` in evaluation mode, on rank 0; None on the others, whose weights take part in it.

    Collective at its beginning; what rank 0 does with the model meanwhile must be no collective. Where every rank holds
    whole weights, the model is the engine's own. Where they are cut (ZeRO-3), or its layers speak to other ranks, rank
    0 gathers a copy in the compute dtype, one parameter at a time, and lets go of it at the end.
    """
    model = engine.model
    # ZeRO-3 gathers weights in each layer's forward, on all ranks together.
    cut = config.parallel.zero_stage == 3 or engine.mesh.shape.sequence > 1 or engine.mesh.shape.pipeline > 1
    if not cut:
        assert isinstance(model, LanguageModel)
        if not engine.mesh.is_main:
            yield None
            return
        model.eval()
        try:
            yield model
        finally:
            model.train()
        return
    yield _gathered(engine, config)


def _gathered(engine: Engine, config: RunConfig) -> LanguageModel | None:
    mesh = engine.mesh
    copy = None
    if mesh.is_main:
        # Its construction draws initial values.
        with torch.random.fork_rng(devices=[mesh.device] if mesh.device.type == "cuda" else []):
            copy = empty_model(config.model, mesh.device, config.precision.compute_dtype).eval()
    parameters = dict(copy.named_parameters()) if copy is not None else {}
    for name, shape in parameter_shapes(config.model).items():
        whole = _whole_parameter(engine, name, shape)
        if copy is not None:
            with torch.no_grad():
                parameters[name].copy_(whole)
    return copy


def _whole_parameter(engine: Engine, name: str, shape: tuple[int, ...]) -> Tensor:
    """One parameter in fp32: each rank puts the part that it owns in its place."""
    whole = torch.zeros(shape, dtype=torch.float32, device=engine.mesh.device)
    for fragment in engine.fragments:
        if fragment.name == name and fragment.owned:
            whole.view(-1).narrow(0, fragment.offset, fragment.numel).copy_(fragment.master)
    return engine.mesh.sum(whole, group="world")
