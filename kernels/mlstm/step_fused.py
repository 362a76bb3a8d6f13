"""The mLSTM step on its Triton kernel, as an operator.

Axes: B batch, NH heads, DK query/key and DV value dimension of a head, T groups of columns.
"""

import torch
from torch import Tensor

from kernels.integers import ceil_div, next_power_of_two
from kernels.mlstm.inputs import CellSettings, StepInputs
from kernels.mlstm.step_kernel import step_kernel
from kernels.operators import operator

NUM_WARPS = 8


@operator("mlstm_step", mutates=("C", "n", "m"))
def mlstm_step(inputs: StepInputs, settings: CellSettings) -> Tensor:
    """h [B, NH, DV] in v's dtype; the state is overwritten."""
    q, k, v, igate_preact, fgate_preact, C, n, m = inputs
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    h = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = max(16, next_power_of_two(key_dim))
    groups = n.shape[2]
    columns = max(16, next_power_of_two(ceil_div(value_dim, groups)))
    assert ceil_div(value_dim, columns) == groups, "the columns of a group are a power of two"
    with torch.cuda.device_of(q):
        step_kernel[(groups, batch * heads)](
            q,
            k,
            v,
            igate_preact,
            fgate_preact,
            C,
            n,
            m,
            h,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *igate_preact.stride(),
            *fgate_preact.stride(),
            key_dim**-0.5,
            settings.eps,
            NH=heads,
            DK=key_dim,
            DV=value_dim,
            ROWS=rows,
            COLUMNS=columns,
            EXP_GATE=settings.gate == "exp",
            NORMALISER=settings.normaliser,
            num_warps=NUM_WARPS,
        )
    return h


@mlstm_step.fake
def _(inputs: StepInputs, settings: CellSettings) -> Tensor:
    return inputs.v.new_empty(inputs.v.shape)
