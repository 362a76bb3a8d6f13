"""The checks of tensor arguments that the recurrences share. Axes: B batch, S sequence."""

import torch
from torch import Tensor


def check_shapes(beside: str, given: Tensor, expected: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raise ValueError for the first tensor of `expected` (name: tensor, shape) without its shape.

    `beside` is the name of the argument `given`, from which the shapes follow.
    """
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with {beside} {tuple(given.shape)}, got {tuple(tensor.shape)}"
            )


def check_bool(document_start: Tensor | None) -> None:
    """Raise ValueError where `document_start` [B, S], if given, is not bool."""
    if document_start is not None and document_start.dtype != torch.bool:
        raise ValueError(f"document_start must be bool, got {document_start.dtype}")
