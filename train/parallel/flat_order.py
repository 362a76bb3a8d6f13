"""The order of parameters in DeepSpeed's flat tensors.

DeepSpeed lays the parameters of a group side by side and lets the model read them there. Compiled kernels load 16 bytes
at a time, and torch.compile looks only at the first of the blocks that share a kernel whether their parameters lie
accordingly: behind a bias of 6 numbers the next block's would not, and the GPU would stop at a misaligned address.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Elements of 16 bits in a load of 16 bytes.
_WIDEST = 8


def aligned_first(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """The parameters, those first whose sizes divide by the widest load, else as they came.

    Side by side from an aligned address, each then begins at a multiple of the power of two in its own size: as aligned
    as its rows are, which is all that kernels over its elements rely on.
    """
    return sorted(named_parameters, key=lambda named: -_alignment(named[1]))


def _alignment(parameter: nn.Parameter) -> int:
    """The power of two in the parameter's number of elements, 8 at most."""
    # Of a parameter that ZeRO-3 has taken apart, the whole's.
    numel = int(getattr(parameter, "ds_numel", parameter.numel()))
    return min(numel & -numel, _WIDEST)
