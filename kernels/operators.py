"""Operators of torch.library that are written with named tuples.

torch.library knows flat lists of tensors and numbers only. Here an operator is a function of those and of named tuples
of them; this file, and no other, lays the tuples out flat and puts them together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def flatten(parts: Iterable[Any]) -> list[Any]:
    """The parts side by side: the fields of a named tuple in its place."""
    flat: list[Any] = []
    for part in parts:
        if isinstance(part, tuple):
            flat.extend(part)
        else:
            flat.append(part)
    return flat


class Layout:
    """How parts of these kinds, classes of named tuples or other types, lie in a flat list."""

    def __init__(self, *kinds: Any):
        # For each part: what makes it of its values (None: it is its value), and where they begin and end.
        self._places: list[tuple[Callable[[Any], Any] | None, int, int]] = []
        self.size = 0
        for kind in kinds:
            end = self.size + (len(kind._fields) if _has_fields(kind) else 1)
            self._places.append((kind._make if _has_fields(kind) else None, self.size, end))
            self.size = end

    def parts(self, values: Sequence[Any]) -> list[Any]:
        """The inverse of `flatten`."""
        return [values[first] if make is None else make(values[first:end]) for make, first, end in self._places]


class Operator(Generic[Parameters, Result]):
    """A function as an operator, which torch.compile and activation checkpointing see as one step.

    Args:
        name: of the operator, in the namespace xlstm_pretrain.
        function: of tensors, numbers, strings, dtypes and named tuples of those, each with its annotation, to a tensor
            or to a named tuple of tensors. No two of its results may share memory, with each other or with arguments.
        mutates: names of the arguments, or fields of arguments, that it overwrites.

    Attributes:
        function: as given; to call it is to leave torch.library out.
        definition: what torch.library made of it, with a flat signature.
    """

    def __init__(self, name: str, function: Callable[Parameters, Result], mutates: Sequence[str] = ()):
        hints = get_type_hints(function)
        self._result: Any = hints.pop("return")
        self._has_parts = _has_fields(self._result)
        self._layout = Layout(*hints.values())
        self.function = function
        names = {}
        for argument, kind in hints.items():
            names.update(get_type_hints(kind) if _has_fields(kind) else {argument: kind})
        flat = self._flat(function)
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = [inspect.Parameter(argument, place, annotation=kind) for argument, kind in names.items()]
        assert len(names) == self._layout.size, "two arguments, or fields of them, have one name"
        result = tuple[(Tensor,) * len(self._result._fields)] if _has_fields(self._result) else self._result  # type: ignore[misc]  # a type made at run time
        flat.__signature__ = inspect.Signature(signature, return_annotation=result)  # type: ignore[attr-defined]
        self.definition = torch.library.custom_op(f"xlstm_pretrain::{name}", flat, mutates_args=tuple(mutates))

    def __call__(self, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        assert not named, "an operator takes its arguments by position"
        return self._as_result(self.definition(*flatten(arguments)))

    def fake(self, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """A decorator: what computes empty results of the right shapes, for torch.compile."""
        self.definition.register_fake(self._flat(function))
        return function

    def differentiate(
        self,
        keep: Callable[[Any, list[Any], Result], None],
        backward: Callable[[Any, Any], tuple[Any, ...]],
    ) -> None:
        """Give the operator its gradient.

        Args:
            keep: called with the context, the arguments and the results; saves what the backward pass needs.
            backward: called with the context and the gradients of the results (a named tuple like theirs, None where
                there is none); returns gradients of the first arguments, as the arguments are. The others have none.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            keep(ctx, self._layout.parts(inputs), self._as_result(output))

        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = flatten(backward(ctx, self._as_result(grads)))
            return *found, *[None] * (self._layout.size - len(found))

        self.definition.register_autograd(gradients, setup_context=setup_context)

    def _as_result(self, values: Any) -> Result:
        return self._result._make(values) if self._has_parts else values

    def _flat(self, function: Callable[Parameters, Result]) -> Callable[..., Any]:
        def flat(*values: Any) -> Any:
            return function(*self._layout.parts(values))  # type: ignore[call-arg]  # what the kinds say

        return flat


def operator(
    name: str, *, mutates: Sequence[str] = ()
) -> Callable[[Callable[Parameters, Result]], Operator[Parameters, Result]]:
    """A decorator that makes an Operator."""
    return lambda function: Operator(name, function, mutates)


def _has_fields(kind: Any) -> bool:
    return hasattr(kind, "_fields")
