"""What a kind of layer tells the rest of the package: one class, implemented once in each file of this folder.

A block is norm, layer ("mixer"), and for most kinds a second norm and a feed-forward layer. A kind owns everything of
its layer: the module, the settings and what they may be, the parameters with their shapes and first values, what a pass
costs, the state, and whether the Hugging Face format can hold it. Accounting, memory, initialisation, validation,
generation, the check of the kernels and the export ask it.

A kind from outside of this package is registered by its own module (`model.layers.register`), which a configuration
names in `model.plugins`; its settings are `model.layers.<name>`. docs/adding_a_layer.md writes a whole one.

Axes: B batch, S sequence, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from model.hardware import Hardware
from model.initial_values import InitialValue, Shape, uniform
from model.problems import Problem
from model.sequence import Entering, SequenceContext

if TYPE_CHECKING:
    import torch

    from kernels.preflight import Case
    from model.config import ModelConfig

# Groups of parameters in the order of the accounting table. A kind may name others, which come before the head.
EMBEDDING = "embedding"
NORMS = "norms"
FEED_FORWARD = "feed-forward"
UP_AND_DOWN = "up and down projections"
QUERY_AND_KEY = "query and key"
VALUE_AND_OUTPUT = "value, output gate, output"
GATES = "gates"
SLSTM_GATES = "sLSTM gates"
RECURRENT_KERNEL = "sLSTM recurrent kernel"
CONVOLUTION = "convolution and skip"
SINKS = "attention sinks"
HEAD = "head"
GROUPS = (
    EMBEDDING,
    NORMS,
    FEED_FORWARD,
    UP_AND_DOWN,
    QUERY_AND_KEY,
    VALUE_AND_OUTPUT,
    GATES,
    SLSTM_GATES,
    RECURRENT_KERNEL,
    CONVOLUTION,
    SINKS,
    HEAD,
)

# Components of the FLOPs that kinds share; a kind adds those of its cell.
PROJECTIONS = "projections"
CONVOLUTION_FLOPS = "convolution"
FEED_FORWARD_FLOPS = "feed-forward"


@dataclass(frozen=True)
class Parameter:
    """One parameter, as the configuration describes it.

    Attributes:
        shape: of the tensor.
        group: the row of the accounting table that counts it.
        initial: its first value.
        product: the component of the FLOPs to which its product with every token counts, 2 FLOPs an element; None:
            none, or the kind counts it itself.
    """

    shape: Shape
    group: str
    initial: InitialValue
    product: str | None = None


@dataclass(frozen=True)
class StateElements:
    """Elements that one layer carries for one sequence from token to token.

    Attributes:
        recurrent: memories, in float32 at least.
        convolution: last inputs of a convolution, in the activations' dtype.
        window: keys and values of the last tokens of a window, in the activations' dtype.
        cache_per_token: of a cache that grows with every token of the context.
    """

    recurrent: int = 0
    convolution: int = 0
    window: int = 0
    cache_per_token: int = 0


@dataclass(frozen=True)
class CellForm:
    """The heads of a layer's cell, as far as its time depends on them.

    Attributes:
        kind: mlstm, slstm or attention.
        heads, key_dim, value_dim: as many, and so wide each; of the sLSTM and of attention both are the head's width.
        window: tokens that a query of attention sees; None: all before it.
    """

    kind: str
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True)
class KernelUse:
    """How a run calls kernels, for the check before its first step.

    Attributes:
        dtype: of the activations that enter matrix products.
        weight_dtype: of the weights that enter none.
        batches: sequences of a call -> whether gradients are computed.
    """

    dtype: torch.dtype
    weight_dtype: torch.dtype
    batches: dict[int, bool]


@runtime_checkable
class SlicedMixer(Protocol):
    """A layer whose ranks exchange once: in parts, of which those around the exchange can be compiled."""

    def opened(self, x: Tensor, document_start: Tensor | None) -> Any:
        """Of x [B, S, D]: what the rest computes with."""
        ...

    def entering(self, opened: Any, state: Any, sequence: SequenceContext) -> Entering[Any]:
        """Begin to exchange."""
        ...

    def beside(self, x: Tensor) -> Tensor:
        """What is computed while the exchange is under way, of x as `opened` got it."""
        ...

    def inside(
        self, opened: Any, entering: Entering[Any], state: Any, return_state: bool, sequence: SequenceContext
    ) -> tuple[Tensor, Any]:
        """What waits for the exchange, and the state behind the sequence, if asked for."""
        ...

    def closed(self, inside: Tensor, beside: Tensor) -> Tensor:
        """y [B, S, D]."""
        ...


class LayerKind(ABC):
    """One kind of layer. Its methods are pure functions of a configuration that `validate` found right.

    Attributes:
        name: of the kind, and of the section of the configuration that holds its settings.
        block: what `model.block` and the lists of positions call it. Two kinds share it when each family has its own.
        families: in whose blocks it may stand.
        family_reason: why in no others, after "<block> blocks".
        has_feed_forward: whether the block has a feed-forward layer behind it.
        loops_on_cpu: whether it goes token by token in PyTorch there. torch.compile would write out every one of them,
            for minutes, so that blocks of this kind are not compiled on a CPU.
        settings_class: frozen dataclass of its settings.
        speed_settings: settings that choose how fast the same is computed; a run may resume with others. A dot leads
            into a section of them.
        first_value_settings: settings that choose the parameters' first values and nothing else.
    """

    name: ClassVar[str]
    block: ClassVar[str]
    families: ClassVar[tuple[str, ...]] = ("xlstm_7b", "neurips")
    family_reason: ClassVar[str] = "do not fit in the blocks of the other family"
    has_feed_forward: ClassVar[bool] = True
    loops_on_cpu: ClassVar[bool] = False
    settings_class: ClassVar[type]
    speed_settings: ClassVar[tuple[str, ...]] = ("backend",)
    first_value_settings: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def validate(self, config: ModelConfig, problem: Problem) -> None:
        """Call `problem` for everything that is wrong with the settings in `config`."""

    @abstractmethod
    def module(self, config: ModelConfig, statistics_name: str) -> nn.Module:
        """The layer with memory for its parameters, which hold no values yet.

        Its forward is (x [B, S, D], document_start [B, S] bool or None, state or None, return_state, sequence) ->
        (y [B, S, D], the state behind x or None): it starts from an empty state at every document's first token,
        exactly; `sequence` is a model.sequence.SequenceContext. A state is a dataclass of tensors (and of such
        dataclasses) whose first axis is B. What the layer measures of itself it records under `statistics_name`.
        """

    @abstractmethod
    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        """Every parameter of the module by its name there, in the module's order."""

    @abstractmethod
    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        """FLOPs of a forward pass over one sequence, by component, beside the products with parameters."""

    @abstractmethod
    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        """FLOPs of one token after `context` others, beside the products with parameters."""

    @abstractmethod
    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        """Bytes per token that the layer and the norm before it keep for the backward pass."""

    def chunk_state_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        """Bytes per token of states between chunks among `activation_bytes`; 0 of a kind that keeps none."""
        return 0.0

    def cell(self, config: ModelConfig) -> CellForm | None:
        """What the layer computes beside products with parameters, as calibrations measure it; None: nothing large."""
        return None

    @abstractmethod
    def state_elements(self, config: ModelConfig) -> StateElements:
        """How large the state of one sequence is."""

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        """Why so many ranks cannot share a sequence, with what to change; None if they can.

        A kind that does not say how it uses its SequenceContext is refused.
        """
        return None if ranks == 1 else f"{self.block} blocks cannot share a sequence among {ranks} ranks; use one"

    def shortest_slice(self, config: ModelConfig) -> int:
        """Tokens that each rank's slice of a sequence must have: what the next one needs to see of it."""
        return 1

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        """Every kernel call of the layer that differs in shape, dtype or setting, to be compared with its reference."""
        return []

    def huggingface_reasons(self, config: ModelConfig, positions: list[int]) -> list[str]:
        """Why the Hugging Face xLSTM format cannot hold these layers, the blocks at `positions`; empty if it can."""
        return [f"{self.block} blocks at {positions}: all blocks are mLSTM blocks there"]

    def settings(self, config: ModelConfig) -> Any:
        """This kind's settings in `config`."""
        return config.section(self.name, self.settings_class)


def convolution_parameters(channels: int, kernel_size: int) -> dict[str, Parameter]:
    """Of the convolution `conv` over time before a cell; none for a kernel size of 0."""
    if kernel_size == 0:
        return {}
    # As PyTorch's own convolutions begin.
    near_zero = uniform(kernel_size**-0.5)
    return {
        "conv.weight": Parameter((channels, 1, kernel_size), CONVOLUTION, near_zero, CONVOLUTION_FLOPS),
        "conv.bias": Parameter((channels,), CONVOLUTION, near_zero),
    }


def by_heads_problem(key: str, n_heads: int, ranks: int) -> str | None:
    """Why a layer of `n_heads`, spread by heads, cannot run on `ranks` sequence ranks."""
    if n_heads % ranks == 0:
        return None
    return f"{key}={n_heads} heads do not divide among {ranks} sequence ranks; choose a divisor of {n_heads}"
