"""Bytes that the mLSTM's Triton kernels keep from the forward pass for the backward pass; needs no Triton and no GPU.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head, L tokens of a chunk, NC chunks,
SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.integers import ceil_div

# Rows of float32 of each token and head: the packed weights of kernels/mlstm/chunkwise/gates.py.
WEIGHT_ROWS = 7


class CellShape(NamedTuple):
    """B, S, NH, DK and DV of one call."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


class KeptBytes(NamedTuple):
    """Bytes of one call, by what they are.

    Attributes:
        tensors: q, k, v, h and both gates' pre-activations. They are kept as they are, without a copy, if they lie as
            the kernels read them, so what made them or takes them may keep the same memory.
        weights: packed weights, decays of the chunks and the normaliser of the queries.
        chunk_states: the memory that enters each chunk; 0 unless it is kept.
    """

    tensors: int
    weights: int
    chunk_states: int


def triton_kept_bytes(
    shape: CellShape, dtype: torch.dtype, gate_dtype: torch.dtype, chunk_tokens: int, keep_chunk_states: bool
) -> KeptBytes:
    """What one call of kernels.mlstm.mlstm keeps, without document starts and the initial state.

    Args:
        shape: of the call.
        dtype: of q, k and v.
        gate_dtype: of the gates' pre-activations.
        chunk_tokens: L, of kernels.mlstm.chunkwise.tiles.chunk_tokens.
        keep_chunk_states: as for kernels.mlstm.mlstm.
    """
    batch, length, heads, key_dim, value_dim = shape
    chunks = ceil_div(length, chunk_tokens)
    sequences, padded = batch * heads, chunks * chunk_tokens
    tokens = batch * length * heads
    state = key_dim * value_dim * dtype.itemsize + 4 * key_dim
    return KeptBytes(
        tensors=tokens * (2 * (key_dim + value_dim) * dtype.itemsize + 2 * gate_dtype.itemsize),
        weights=4 * sequences * ((WEIGHT_ROWS + 1) * padded + chunks),
        chunk_states=sequences * chunks * state if keep_chunk_states else 0,
    )
