"""The global order: a keyed permutation of range(n) that is computed, never stored.

A Feistel network on exactly bit_length(n - 1) bits with halves of unequal width, cycle-walked into range(n) (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", method 2). The round function multiplies and xor-shifts in both
directions, so that every output bit depends on every input bit; a function that is affine modulo a power of two would
leave the low bits of the output a function of the low bits of the input alone.

Keys come from a hash of what they are for. Seeds that are added to epochs or ranks would repeat each other's streams.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import numpy as np

# Part of the identity of a run: another version is another order.
ORDER_VERSION = 1
ROUNDS = 6

_WEYL = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


@lru_cache(maxsize=65536)
def derive_key(*parts: int | str) -> int:
    """64-bit key from what it is for, e.g. derive_key(seed, "samples", source, epoch)."""
    message = json.dumps(["xlstm-pretrain order", ORDER_VERSION, *parts], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(message.encode()).digest()[:8], "little")


def permute(indices: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Image of each of `indices` (int64, in range(n)) under the permutation of range(n) that `key` selects.

    `key` is one 64-bit integer, or a uint64 array that gives each index its own permutation. Returns int64.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if n < 1 or indices.size and (indices.min() < 0 or indices.max() >= n):
        raise ValueError(f"permute: every index must be in range({n})")
    bits = (n - 1).bit_length()
    values = indices.astype(np.uint64).ravel()
    if bits == 0:
        return indices.copy()
    if isinstance(key, np.ndarray):
        keys = np.broadcast_to(key.astype(np.uint64), indices.shape).ravel()
    else:
        keys = np.full(1, key, dtype=np.uint64)
    values = _feistel(values, bits, keys)
    # The domain is smaller than 2n, so that two passes do on average.
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel(values[outside], bits, keys[outside] if keys.size > 1 else keys)
    return values.astype(np.int64).reshape(indices.shape)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    low_width = (bits + 1) // 2
    low_mask = np.uint64((1 << low_width) - 1)
    high_mask = np.uint64((1 << (bits - low_width)) - 1)
    low = values & low_mask
    high = values >> np.uint64(low_width)
    for turn in range(ROUNDS):
        round_key = _mix(keys + np.uint64((turn + 1) * _WEYL & _MASK_64))
        if turn % 2 == 0:
            high = high ^ (_mix(low + round_key) & high_mask)
        else:
            low = low ^ (_mix(high + round_key) & low_mask)
    return (high << np.uint64(low_width)) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014) on uint64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))
