"""What the products of a decoding step take and give.

Axes: M rows (sequences), D model width, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NormWeights(NamedTuple):
    """The scale [width] of an RMS norm or a head norm, and what it adds to the mean square or the variance."""

    norm_weight: Tensor
    eps: float


class MixerWeights(NamedTuple):
    """What an mLSTM layer reads its input with: matrices [outputs, D], biases [NH].

    Queries and keys have NH * DK outputs, values and output gate NH * DV, the input and the forget gate NH.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output_gate: Tensor
    igate: Tensor
    igate_bias: Tensor
    fgate: Tensor
    fgate_bias: Tensor


class MixerInputs(NamedTuple):
    """What an mLSTM layer makes of its input.

    Attributes:
        features: [M, 2 NH DK + 2 NH DV]: queries, keys, values and pre-activations of the output gate, side by side.
        gates: [M, 2 NH] pre-activations of input and forget gate, after bias and soft cap; float32 at least.
    """

    features: Tensor
    gates: Tensor
