"""The sLSTM as a readable loop over time: the specification that faster backends are tested against.

Source: xLSTM (arXiv 2405.04517), section 2.2, equations 8 to 18, with forget gate sigmoid.
Axes: B batch, S sequence, NH heads, DH dimension of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import autocast_disabled
from kernels.slstm.inputs import final_state, prepare
from kernels.slstm.state import SLSTMState
from kernels.soft_cap import soft_cap


def slstm_recurrent(
    gates_x: Tensor,
    recurrent_kernel: Tensor,
    *,
    document_start: Tensor | None = None,
    initial_state: SLSTMState | None = None,
    return_state: bool = False,
    gate_soft_cap: float | None = None,
) -> tuple[Tensor, SLSTMState | None]:
    """One token after the other, differentiated by autograd. Arguments and result as kernels.slstm.slstm."""
    with autocast_disabled(gates_x):
        x = prepare(gates_x, recurrent_kernel, document_start, initial_state, gate_soft_cap)
        h, c, n, m = x.h, x.c, x.n, x.m
        outputs = []
        for t, gates_here in enumerate(x.gates_x.unbind(0)):
            if x.starts is not None:
                h = h.masked_fill(x.starts[t], 0)
                m = m.masked_fill(x.starts[t], -torch.inf)
            i, f, z, o = torch.baddbmm(gates_here, h, x.recurrent_kernel).chunk(4, dim=-1)
            i, log_forget = soft_cap(i, gate_soft_cap), F.logsigmoid(soft_cap(f, gate_soft_cap))
            kept = log_forget + m
            m = torch.maximum(kept, i).detach()
            # The memory of an earlier document is weighted with exp(-inf) = 0.
            input_gate, forget_gate = torch.exp(i - m), torch.exp(kept - m)
            c = forget_gate * c + input_gate * torch.tanh(z)
            n = forget_gate * n + input_gate
            h = torch.sigmoid(o) * c / n
            outputs.append(h)
        # [S, NH, B, DH] -> [B, S, NH, DH]
        h_all = torch.stack(outputs).permute(2, 0, 1, 3).to(gates_x.dtype)
        return h_all, final_state(h, c, n, m) if return_state else None
