"""The kinds of layers that a block may have: one file each, found here by the names that a configuration uses.

from model.layers import LayerKind, register        what a module of another package needs to add its own kind
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from model.layers import (
    attention,
    gated_deltanet,
    gla,
    mamba2,
    mlstm,
    mlstm_attention,
    preup_mlstm,
    retnet,
    slstm,
)
from model.layers.base import KernelUse, LayerKind, Parameter, StateElements

if TYPE_CHECKING:
    from model.config import ModelConfig

__all__ = [
    "KernelUse",
    "LayerKind",
    "Parameter",
    "StateElements",
    "block_names",
    "built_in_kinds",
    "further_kinds",
    "import_plugins",
    "layer_kind",
    "layer_kinds",
    "register",
    "registered_kinds",
    "sequence_problems",
]

_BUILT_IN: tuple[LayerKind, ...] = (mlstm.KIND, preup_mlstm.KIND, slstm.KIND, attention.KIND)
# Of this package too; their settings are in `model.layers`, as those of plugins.
_FURTHER: tuple[LayerKind, ...] = (mlstm_attention.KIND, gla.KIND, retnet.KIND, mamba2.KIND, gated_deltanet.KIND)
_registered: dict[str, LayerKind] = {kind.name: kind for kind in (*_BUILT_IN, *_FURTHER)}


def register(kind: LayerKind) -> None:
    """Make a kind of layer known. A module that is run again (a notebook's) replaces its own kind.

    Raises:
        ValueError: the name, or the block's name in one of its families, belongs to another kind.
    """
    for other in _registered.values():
        if (type(other).__module__, type(other).__qualname__) == (type(kind).__module__, type(kind).__qualname__):
            continue
        if other.name == kind.name:
            raise ValueError(f"a kind of layer named {kind.name!r} is registered already, by {type(other).__module__}")
        if other.block == kind.block and set(other.families) & set(kind.families):
            raise ValueError(f"blocks {kind.block!r} are of the kind {other.name!r} already")
    _registered[kind.name] = kind


def registered_kinds() -> list[LayerKind]:
    """All that are known, the built-in ones first."""
    return list(_registered.values())


def built_in_kinds() -> list[LayerKind]:
    """Those whose settings are sections of ModelConfig."""
    return list(_BUILT_IN)


def further_kinds() -> list[LayerKind]:
    """Those of this package whose settings are in `ModelConfig.layers`."""
    return list(_FURTHER)


def block_names() -> list[str]:
    """What `model.block` may be."""
    return list(dict.fromkeys(kind.block for kind in registered_kinds()))


def import_plugins(config: ModelConfig) -> list[str]:
    """Import the modules of `config.plugins`, which register their kinds; returns why some cannot be imported."""
    problems = []
    for name in config.plugins:
        try:
            importlib.import_module(name)
        # Whatever a module does wrong while it is imported is told with its name.
        except Exception as error:
            problems.append(
                f"{name!r} cannot be imported ({type(error).__name__}: {error}); it must be a module on Python's path, "
                "such as my_package.my_layer"
            )
    return problems


def layer_kind(config: ModelConfig, block: str) -> LayerKind:
    """The kind of the blocks that `config` calls `block`. Imports its plugins.

    Raises:
        ValueError: no kind of that name stands in blocks of the family, or a plugin cannot be imported.
    """
    problems = import_plugins(config)
    if problems:
        raise ValueError("model.plugins: " + "; ".join(problems))
    for kind in _registered.values():
        if kind.block == block and config.family in kind.families:
            return kind
    raise ValueError(
        f"no kind of layer '{block}' is known in blocks of family={config.family}; known are "
        f"{', '.join(block_names())}; name the module that registers it in model.plugins"
    )


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kind of every block of a valid `config`, first to last."""
    names = config.block_kinds()
    kinds = {name: layer_kind(config, name) for name in dict.fromkeys(names)}
    return [kinds[name] for name in names]


def sequence_problems(config: ModelConfig, ranks: int, sequence_length: int | None = None) -> list[str]:
    """Why layers of a valid `config` cannot be spread over so many sequence ranks, each with the number to change.

    `sequence_length`: tokens of a sequence, all ranks together; None: long enough for any number of ranks.
    """
    kinds = list(dict.fromkeys(layer_kinds(config)))
    problems = [problem for kind in kinds if (problem := kind.sequence_problem(config, ranks)) is not None]
    if ranks == 1 or sequence_length is None:
        return problems
    return problems + [
        f"{kind.block} blocks look {tokens} tokens back, and a slice has {sequence_length // ranks}; use at most "
        f"{max(1, sequence_length // tokens)} ranks or longer sequences"
        for kind in kinds
        if (tokens := kind.shortest_slice(config)) > sequence_length // ranks
    ]
