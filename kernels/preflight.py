"""Do the kernels compute what the references do, with this Triton on this GPU? A trainer asks before it starts.

A Triton release may compile a kernel wrongly for one GPU or one shape and say nothing; a run then trains on wrong
gradients. Each case below is one operation in the shapes of a model, on few tokens: it runs forward and backward, and
forward alone, for which some operations have other kernels; every output and gradient is compared with the reference
in float64 on the same rounded inputs.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, DH dimension of a head, D model dimension,
V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend_choice import HAS_TRITON
from kernels.cross_entropy import MASKED, linear_cross_entropy, linear_cross_entropy_sum
from kernels.head_norm import gated_head_norm, head_norm
from kernels.linear_recurrence import RecurrenceInputs, linear_recurrence
from kernels.mlstm import mlstm
from kernels.slstm import slstm

# Two chunks of 128 tokens or one of 256, and a remainder that no tile divides.
BATCH, LENGTH = 2, 256 + 37


@dataclass(frozen=True)
class Finding:
    """One tensor of one case.

    Attributes:
        operation: the case in words.
        tensor: "h", "loss" or "y", the same "without gradients" (as in evaluation), or "gradient of ..." an input.
        error: ||kernel - reference|| / ||reference||; NaN where the kernel's result holds one.
        limit: the largest error that counts as agreement (docs/kernels.md).
    """

    operation: str
    tensor: str
    error: float
    limit: float

    @property
    def agrees(self) -> bool:
        """False for a NaN too."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.operation}: {self.tensor} is off by {self.error:.1e} of its norm, more than {self.limit:.0e}"


class Case(ABC):
    """One operation, in the shapes and settings of a model; as a string, what a message calls it."""

    # One of kernels.backend_choice.BACKENDS: what the run passes to the operation.
    backend: str
    # Whether gradients are compared too.
    trains = True

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random arguments on the CPU that gradients are taken of, in the run's dtypes; the first one begins with B."""

    @abstractmethod
    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        """What the operation returns, by name; document_start is [B, S] bool."""

    @abstractmethod
    def limit(self, tensor: str) -> float:
        """The largest error at which an output, or the gradient of the input of that name, agrees."""


@dataclass(frozen=True)
class MLSTMCase(Case):
    """kernels.mlstm.mlstm with documents, without states: as in training.

    Attributes:
        igate_bias: mean of the input gate's pre-activation. The read-out divides by |n^T q| at 2, and by its floor
            at -10, where xLSTM-7B begins (arXiv 2503.13427); in between, tokens near both have gradients that jump.
        batch: sequences. Tiles depend on it.
        trains: False for a batch that only an evaluation has.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    igate_bias: float = 2.0
    gate: str = "exp"
    normaliser: bool = True
    eps: float = 1e-6
    batch: int = BATCH
    backend: str = "auto"
    trains: bool = True

    def __str__(self) -> str:
        normaliser = "" if self.normaliser else " without normaliser"
        dims = _heads(self.heads, self.key_dim, self.value_dim)
        gate = f"gate {self.gate} at {self.igate_bias:g}{normaliser}"
        return f"mLSTM ({dims}, {gate}, batch of {self.batch}, {_name(self.dtype)})"

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Forget gates from 0.95 to 0.998 over the heads, as xLSTM-7B begins: memory passes from chunk to chunk.

        Queries and keys have a mean that makes their product 4 on average, so that n^T q does not pass through 0,
        where roundings decide the result; and no token fills the memory alone, where the gradient of q cancels out.
        """
        mean = 2 * self.key_dim**-0.25
        tokens = (self.batch, LENGTH, self.heads)
        normal = _Normal(generator)
        values = {name: (mean + normal(*tokens, self.key_dim)).to(self.dtype) for name in ("q", "k")}
        values["v"] = normal(*tokens, self.value_dim).to(self.dtype)
        open_gates = torch.linspace(6, 3, self.heads)
        gates = {"igate_preact": self.igate_bias + 0.5 * normal(*tokens), "fgate_preact": open_gates + normal(*tokens)}
        return values | gates

    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        settings = {"gate": self.gate, "normaliser": self.normaliser, "eps": self.eps, "backend": backend}
        arguments: dict[str, Any] = {**inputs, **settings}
        return {"h": mlstm(**arguments, document_start=document_start)[0]}

    def limit(self, tensor: str) -> float:
        if self.dtype == torch.float32:
            return 1e-4 if tensor == "fgate_preact" else 1e-5
        return {"h": 4e-3, "fgate_preact": 1e-2}.get(tensor, 6e-3)


@dataclass(frozen=True)
class SLSTMCase(Case):
    """kernels.slstm.slstm with documents, without states. The gates are float32, `dtype` is the recurrent kernel's."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    gate_soft_cap: float | None = None
    backend: str = "auto"

    def __str__(self) -> str:
        return f"sLSTM ({_heads(self.heads, self.head_dim)}, {_name(self.dtype)})"

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A recurrence that does not amplify errors from token to token."""
        normal = _Normal(generator)
        kernel = 0.5 * self.head_dim**-0.5 * normal(self.heads, self.head_dim, 4, self.head_dim)
        gates_x = 1.5 * normal(BATCH, LENGTH, 4, self.heads, self.head_dim)
        return {"gates_x": gates_x, "recurrent_kernel": kernel.to(self.dtype)}

    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        arguments: dict[str, Any] = {**inputs, "gate_soft_cap": self.gate_soft_cap, "backend": backend}
        return {"h": slstm(**arguments, document_start=document_start)[0]}

    def limit(self, tensor: str) -> float:
        output, gradient = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 2e-3)}.get(self.dtype, (4e-3, 1e-2))
        return output if tensor == "h" else gradient


@dataclass(frozen=True)
class LinearRecurrenceCase(Case):
    """kernels.linear_recurrence with documents, without states. The decays are float32.

    Attributes:
        per_feature: a decay of each key feature.
        delta_rule: with the delta rule, whose keys have length 1.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    per_feature: bool = False
    delta_rule: bool = False
    backend: str = "auto"

    def __str__(self) -> str:
        decay = "decay of each feature" if self.per_feature else "decay of each head"
        rule = ", delta rule" if self.delta_rule else ""
        dims = _heads(self.heads, self.key_dim, self.value_dim)
        return f"linear recurrence ({dims}, {decay}{rule}, {_name(self.dtype)})"

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Decays from 0.9 to 1: memory passes from chunk to chunk."""
        normal, tokens = _Normal(generator), (BATCH, LENGTH, self.heads)
        values = {name: normal(*tokens, self.key_dim) for name in ("q", "k")}
        if self.delta_rule:
            values = {name: x / x.norm(dim=-1, keepdim=True) for name, x in values.items()}
        values["v"] = normal(*tokens, self.value_dim)
        values = {name: x.to(self.dtype) for name, x in values.items()}
        decays = (*tokens, self.key_dim) if self.per_feature else tokens
        values["log_decay"] = -0.1 * torch.sigmoid(normal(*decays))
        if self.delta_rule:
            values["beta"] = torch.sigmoid(normal(*tokens)).to(self.dtype)
        return values

    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        of_tokens = RecurrenceInputs(**inputs, scale=self.key_dim**-0.5)
        return {"y": linear_recurrence(of_tokens, document_start=document_start, backend=backend)[0]}

    def limit(self, tensor: str) -> float:
        """Not measured on a GPU yet: what roundings of the products, and of the memory between chunks, may leave.

        The gradient of a decay is the difference of two sums over all later tokens.
        """
        if self.dtype == torch.float32:
            return 3e-3 if tensor == "log_decay" else 2e-3
        return {"y": 1e-2, "log_decay": 3e-2}.get(tensor, 2e-2)


@dataclass(frozen=True)
class HeadNormCase(Case):
    """kernels.head_norm, with the output gate behind it or without."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    eps: float
    is_gated: bool
    backend: str = "auto"

    def __str__(self) -> str:
        kind = "gated head norm" if self.is_gated else "head norm"
        return f"{kind} ({_heads(self.heads, self.head_dim)}, {_name(self.dtype)})"

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        normal, width = _Normal(generator), self.heads * self.head_dim
        values = {"h": (normal(BATCH, LENGTH, self.heads, self.head_dim) + 2).to(self.dtype)}
        if self.is_gated:
            values["gate_preact"] = (2 * normal(BATCH, LENGTH, width)).to(self.dtype)
        return values | {"weight": normal(width).to(self.weight_dtype)}

    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        function = gated_head_norm if self.is_gated else head_norm
        return {"y": function(**inputs, eps=self.eps, backend=backend)}

    def limit(self, tensor: str) -> float:
        # What rounding leaves: all is computed in float32.
        dtype = self.weight_dtype if tensor == "weight" else self.dtype
        return {torch.float32: 1e-6, torch.float16: 6e-4}.get(dtype, 4e-3)


@dataclass(frozen=True)
class LossCase(Case):
    """kernels.cross_entropy: the summed loss of training, or each token's loss."""

    width: int
    vocabulary: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    soft_cap: float | None = None
    z_loss_weight: float = 0.0
    is_sum: bool = True
    backend: str = "auto"

    def __str__(self) -> str:
        kind = "summed loss" if self.is_sum else "loss of tokens"
        return f"{kind} (width {self.width}, {self.vocabulary} token ids, {_name(self.dtype)})"

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Logits of deviation 2: far from uniform, and a cap of 30 moves the largest by more than any limit."""
        normal = _Normal(generator)
        weight = 2 * self.width**-0.5 * normal(self.vocabulary, self.width)
        return {"hidden": normal(BATCH, LENGTH, self.width).to(self.dtype), "weight": weight.to(self.weight_dtype)}

    def output(self, document_start: Tensor, backend: str, **inputs: Tensor) -> dict[str, Tensor]:
        # Any fixed ids do; the first token of a document is not scored.
        ids = torch.arange(BATCH * LENGTH, device=document_start.device).view(BATCH, LENGTH) * 7919 % self.vocabulary
        settings = {"soft_cap": self.soft_cap, "z_loss_weight": self.z_loss_weight, "backend": backend}
        function = linear_cross_entropy_sum if self.is_sum else linear_cross_entropy
        arguments: dict[str, Any] = {**inputs, **settings}
        return {"loss": function(**arguments, targets=ids.masked_fill(document_start, MASKED))}

    def limit(self, tensor: str) -> float:
        if self.dtype == torch.float32:
            return 1e-6 if tensor == "loss" else 2e-6
        output, gradient = (6e-4, 1e-3) if self.dtype == torch.float16 else (4e-3, 6e-3)
        return output if tensor == "loss" else gradient


def compare(case: Case, device: torch.device) -> list[Finding]:
    """Run a case with its backend and with the reference in float64.

    One finding for each output, for the same from a pass without gradients, and for each gradient.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {name: x.to(device) for name, x in case.inputs(generator).items()}
    document_start = torch.zeros(len(next(iter(inputs.values()))), LENGTH, dtype=torch.bool)
    # In the middle of a chunk, and on the edge of one of 64 or 128 tokens.
    document_start[0, [0, 100]] = document_start[-1, [0, 128]] = True
    document_start = document_start.to(device)
    doubles = {name: x.double() for name, x in inputs.items()}
    findings = []
    with torch.no_grad():
        evaluated = case.output(document_start, case.backend, **inputs)
    if case.trains:
        actual, cotangents = _run(case, inputs, document_start, case.backend, None, generator)
        expected, _ = _run(case, doubles, document_start, "reference", cotangents, generator)
    else:
        actual = {}
        with torch.no_grad():
            expected = case.output(document_start, "reference", **doubles)

    def judge(tensor: str, name: str, value: Tensor) -> None:
        error = ((value.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)).item()
        findings.append(Finding(str(case), tensor, error, case.limit(name)))

    for name, value in actual.items():
        judge(f"gradient of {name}" if name in inputs else name, name, value)
    for name, value in evaluated.items():
        judge(f"{name} without gradients", name, value)
    return findings


def unsupported_triton() -> str | None:
    """Why the kernels were not tested with the Triton that is installed; None if they were, or if there is none."""
    if not HAS_TRITON:
        return None
    from kernels.triton_support import SUPPORTED_VERSIONS, triton_version

    (first_major, first_minor), (end_major, end_minor) = SUPPORTED_VERSIONS
    if SUPPORTED_VERSIONS[0] <= triton_version() < SUPPORTED_VERSIONS[1]:
        return None
    return (
        f"Triton {importlib.metadata.version('triton')} is installed, and the kernels were tested with "
        f"{first_major}.{first_minor} and later, before {end_major}.{end_minor}"
    )


def _run(
    case: Case,
    inputs: dict[str, Tensor],
    document_start: Tensor,
    backend: str,
    cotangents: list[Tensor] | None,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the cotangents that were used: drawn in the outputs' dtypes if None."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        outputs = case.output(document_start, backend, **leaves)
    if cotangents is None:
        normal = _Normal(generator)
        cotangents = [normal(*x.shape).to(x.device, x.dtype) for x in outputs.values()]
    weights = [cotangent.to(x.dtype) for cotangent, x in zip(cotangents, outputs.values(), strict=True)]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    results = {name: x.detach() for name, x in outputs.items()}
    return results | dict(zip(leaves, gradients, strict=True)), cotangents


@dataclass(frozen=True)
class _Normal:
    """Standard normal numbers on the CPU, the same on every machine."""

    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _heads(count: int, *dims: int) -> str:
    return f"{count} {'head' if count == 1 else 'heads'} of {'/'.join(map(str, dims))}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
