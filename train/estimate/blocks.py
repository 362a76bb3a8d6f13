"""What a pass over one block, and over the head, takes of a GPU by itself: products, cell, and bytes that are moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.attention import keys_per_query
from model.config import ModelConfig
from model.hardware import Hardware
from model.layers import feed_forward, layer_kinds
from model.memory import LOSS_CHUNK_TOKENS
from model.parameters import block_parameters
from train.estimate.rates import Rates

# Read and written of each weight's gradient where a micro-batch's, in bf16, is added to the sum: it is copied to fp32.
GRADIENT_BYTES = 18.0
# The same once a step with ZeRO-1 in bf16, which copies gradients into a row, that to bf16, and both back.
REDUCED_BYTES = 28.0


@dataclass(frozen=True)
class BlockWork:
    """A block's part of a pass over so many tokens of a rank.

    Attributes:
        products: seconds of the forward products with parameters; backward takes twice as long.
        cell_forward, cell_both: seconds of the cell.
        moved: seconds of moving, once, the bytes that the block keeps for the backward pass.
        parameters: of the block.
    """

    products: float
    cell_forward: float
    cell_both: float
    moved: float
    parameters: int


def block_works(
    config: ModelConfig, batch: int, length: int, hardware: Hardware, rates: Rates, slices: int = 1
) -> dict[str, BlockWork]:
    """The work of each kind of block, by the kind's name, where `slices` ranks share sequences of `length` tokens.

    What a compiled block keeps is counted as the written one's; that it moves less shows in its coefficient.
    """
    tokens = batch * length // slices
    found: dict[str, BlockWork] = {}
    for index, kind in enumerate(layer_kinds(config)):
        if kind.name in found:
            continue
        parameters = block_parameters(config, index)
        products = sum(
            _product(tokens, parameter.shape, rates)
            for parameter in parameters.values()
            if parameter.product is not None
        )
        form = kind.cell(config)
        if form is None:
            cell = (0.0, 0.0)
        elif form.kind == "mlstm":
            cell = rates.cell(form, batch, length // slices)
        else:
            # All of the time for some of the heads.
            forward, both = rates.cell(form, batch, length)
            cell = (forward / slices, both / slices) if form.kind == "attention" else (forward, both)
        kept = kind.activation_bytes(config, length, hardware)
        if kind.has_feed_forward:
            kept += feed_forward.activation_bytes(config, hardware)
        if form is not None and form.kind == "attention":
            # The mask of documents is read by the cell.
            kept -= hardware.compute_bytes * keys_per_query(length, form.window)
        found[kind.name] = BlockWork(
            products=products,
            cell_forward=cell[0],
            cell_both=cell[1],
            moved=rates.moving(kept * tokens),
            parameters=sum(math.prod(parameter.shape) for parameter in parameters.values()),
        )
    return found


def _product(tokens: int, shape: tuple[int, ...], rates: Rates) -> float:
    if len(shape) == 2:
        return rates.products(tokens, shape[1], shape[0])
    # Block diagonal, or a convolution: small products, bound by what they read and write.
    blocks, outputs, inputs = (*shape, 1)[:3]
    return rates.moving(2.0 * tokens * blocks * (inputs + outputs))


def has_aligned_head(config: ModelConfig) -> bool:
    """Whether rows of logits begin where tensor cores read them at once."""
    return config.vocab_size % 8 == 0


def head_products(config: ModelConfig, tokens: int, rates: Rates) -> float:
    """Seconds of the head's three products, over a chunk of tokens after another, of an aligned vocabulary."""
    chunk = min(tokens, LOSS_CHUNK_TOKENS)
    return 3 * rates.products(chunk, config.d_model, config.vocab_size) * tokens / chunk


def logits_moved(config: ModelConfig, tokens: int, rates: Rates) -> float:
    """Seconds of moving all logits, in fp32, once."""
    return rates.moving(4.0 * config.vocab_size * tokens)
