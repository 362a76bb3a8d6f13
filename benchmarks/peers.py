"""Every implementation that the benchmark can run, ours and others', behind one small interface.

The packages of others are imported only when named. They are called through their public functions, each in its own
memory layout, so that no copy of ours counts against them.

Axes: B batch, S sequence, NH heads, D dimension of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case
from kernels.mlstm import mlstm
from kernels.slstm import slstm

Inputs = dict[str, Tensor]
Gradients = dict[str, Tensor]


@dataclass
class Call:
    """One problem in the layout of one implementation.

    Attributes:
        leaves: what gradients are taken of.
        forward: computes the output from the leaves.
        upstream: gradient of the output, in its layout.
        output: brings an output into [B, S, NH, D].
        gradients: brings the gradients of the leaves into the names and layouts of Case.inputs, those that have any.
        to_upstream: brings a gradient [B, S, NH, D] into the layout of `upstream`.
    """

    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    upstream: Tensor
    output: Callable[[Tensor], Tensor] = field(default=lambda h: h)
    gradients: Callable[[list[Tensor]], Gradients] | None = None
    to_upstream: Callable[[Tensor], Tensor] = field(default=lambda dh: dh)

    def forward_only(self) -> Tensor:
        """The output, without anything kept for a backward pass."""
        with torch.no_grad():
            return self.forward()

    def both(self) -> tuple[Tensor, ...]:
        """Output and gradients of all leaves."""
        h = self.forward()
        return h, *torch.autograd.grad(h, self.leaves, self.upstream)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: for --peers and the tables.
        kind: "mlstm" or "slstm", the cases that it can do.
        prepare: makes a Call from a case and its inputs.
        operation: what it computes, a key of benchmarks.correctness.OPERATIONS, or None for another recurrence, which
            is timed but has no error.
        compare_with: which of our rows its times are divided by.
        exact_gradients: False where the gradient through the normaliser is left out, as is right only before a
            scale-invariant norm.
        compiler: "nvcc" where a first call compiles for minutes, and cannot be interrupted.
        note: for the table.
    """

    name: str
    kind: str
    prepare: Callable[[Case, Inputs], Call]
    operation: str | None
    compare_with: str
    exact_gradients: bool = True
    compiler: str = ""
    note: str = ""


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


MLSTM_LEAVES = ("q", "k", "v", "igate_preact", "fgate_preact")


def _ours_mlstm(case: Case, x: Inputs, *, backend: str, settings: dict, gate: str = "exp", **options) -> Call:
    leaves = [_leaf(x[name]) for name in MLSTM_LEAVES]
    return Call(
        leaves,
        lambda: mlstm(*leaves, gate=gate, backend=backend, **options, **settings)[0],
        x["dh"],
        gradients=lambda g: dict(zip(MLSTM_LEAVES, g, strict=True)),
    )


def _mlstm_kernels(case: Case, x: Inputs, *, kernel: str, **options) -> Call:
    from mlstm_kernels.torch import get_mlstm_kernel

    function = get_mlstm_kernel(kernel)
    leaves = [_leaf(_heads_first(x[name])) for name in MLSTM_LEAVES]
    return Call(
        leaves,
        lambda: function(*leaves, **options),
        _heads_first(x["dh"]),
        output=lambda h: h.transpose(1, 2),
        gradients=lambda g: {n: part.transpose(1, 2) for n, part in zip(MLSTM_LEAVES, g, strict=True)},
        to_upstream=_heads_first,
    )


def _simple_gla(case: Case, x: Inputs) -> Call:
    from fla.ops.simple_gla import chunk_simple_gla

    preact = x["fgate_preact"]
    leaves = [_leaf(part) for part in (x["q"], x["k"], x["v"], F.logsigmoid(preact))]

    def gradients(parts: list[Tensor]) -> Gradients:
        dq, dk, dv, dg = parts
        return {"q": dq, "k": dk, "v": dv, "fgate_preact": dg * torch.sigmoid(-preact)}

    return Call(leaves, lambda: chunk_simple_gla(*leaves)[0], x["dh"], gradients=gradients)


def _attention(case: Case, x: Inputs) -> Call:
    batch, length, heads, dim = x["v"].shape
    shape = (3, batch, heads * dim // 128, length, 128)
    leaves = [_leaf(part) for part in torch.randn(shape, device=x["v"].device).to(x["v"].dtype).unbind(0)]

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*leaves, is_causal=True)

    return Call(leaves, forward, torch.randn_like(leaves[0]))


def _ours_slstm(case: Case, x: Inputs, *, backend: str, settings: dict) -> Call:
    leaves = [_leaf(x["gates_x"]), _leaf(x["recurrent_kernel"])]
    return Call(
        leaves,
        lambda: slstm(*leaves, backend=backend, **settings)[0],
        x["dh"],
        gradients=lambda g: {"gates_x": g[0], "recurrent_kernel": g[1]},
    )


def _flashrnn(case: Case, x: Inputs, *, backend: str) -> Call:
    from flashrnn import flashrnn

    # Theirs is [gate, NH, output unit, input unit].
    kernel = x["recurrent_kernel"].permute(2, 0, 3, 1).contiguous()
    bias = kernel.new_zeros(kernel.shape[:3])
    leaves = [_leaf(x["gates_x"]), _leaf(kernel)]

    def to_upstream(dh: Tensor) -> Tensor:
        # They return all of h, c, n, m; a gradient for the whole spares them a selection in the backward pass.
        return torch.cat([dh[None], dh.new_zeros(3, *dh.shape)])

    return Call(
        leaves,
        lambda: flashrnn(*leaves, bias, function="slstm", backend=backend, dtype="bfloat16")[0],
        to_upstream(x["dh"]),
        output=lambda states: states[0],
        gradients=lambda g: {"gates_x": g[0], "recurrent_kernel": g[1].permute(1, 3, 0, 2)},
        to_upstream=to_upstream,
    )


def _xlstm_cell(case: Case, x: Inputs) -> Call:
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    batch, _, _, heads, dim = x["gates_x"].shape
    config = sLSTMCellConfig(hidden_size=heads * dim, num_heads=heads, batch_size=batch, dtype="bfloat16")
    cell = sLSTMCell(config).to(x["gates_x"].device)
    parameters = dict(cell.named_parameters())
    with torch.no_grad():
        parameters["_bias_"].zero_()
        parameters["_recurrent_kernel_"].copy_(x["recurrent_kernel"].flatten(-2))
    leaves = [_leaf(x["gates_x"].flatten(2)), parameters["_recurrent_kernel_"]]

    def gradients(parts: list[Tensor]) -> Gradients:
        return {
            "gates_x": parts[0].view_as(x["gates_x"]),
            "recurrent_kernel": parts[1].view_as(x["recurrent_kernel"]),
        }

    return Call(
        leaves,
        lambda: cell(leaves[0])[0],
        _heads_first(x["dh"]),
        output=lambda h: h.transpose(1, 2),
        gradients=gradients,
        to_upstream=_heads_first,
    )


def _lstm(case: Case, x: Inputs) -> Call:
    dh = x["dh"].flatten(2)
    width = dh.shape[-1]
    module = torch.nn.LSTM(width, width, batch_first=True, device=dh.device, dtype=dh.dtype)
    leaves = [_leaf(torch.randn(dh.shape, device=dh.device).to(dh.dtype)), *module.parameters()]
    return Call(leaves, lambda: module(leaves[0])[0], dh)


def ours(backend: str, settings: dict) -> list[Contender]:
    """Our rows, the first of each kind being what others are compared with.

    Args:
        backend: of kernels.mlstm and kernels.slstm.
        settings: further arguments, by kind.
    """
    recurrent = partial(_ours_slstm, backend=backend, settings=settings.get("slstm", {}))
    cell = partial(_ours_mlstm, backend=backend, settings=settings.get("mlstm", {}))
    unnormalised = partial(cell, gate="sigmoid", normaliser=False)
    return [
        Contender("ours", "mlstm", cell, "exp", "ours"),
        Contender("ours_kept", "mlstm", partial(cell, keep_chunk_states=True), "exp", "ours", note="chunk states kept"),
        Contender("ours_slstm", "slstm", recurrent, "slstm", "ours_slstm"),
        Contender("ours_sigmoid", "mlstm", partial(cell, gate="sigmoid"), "sigmoid", "ours"),
        Contender("ours_sigmoid_raw", "mlstm", unnormalised, "sigmoid_raw", "ours", note="no normaliser"),
    ]


def _tfla(kernel: str, **options) -> Callable[[Case, Inputs], Call]:
    return partial(_mlstm_kernels, kernel=f"chunkwise--triton_{kernel}", **options)


PEERS = {
    peer.name: peer
    for peer in (
        Contender("xl_chunk", "mlstm", _tfla("xl_chunk", chunk_size=128), "exp", "ours", False, note="L=128"),
        Contender("simple_gla", "mlstm", _simple_gla, "decay", "ours", note="no input gate, no normaliser"),
        Contender("cudnn_attention", "mlstm", _attention, None, "ours", note="causal attention, heads of 128"),
        Contender("lstm", "slstm", _lstm, None, "ours_slstm", note="torch.nn.LSTM, dense, with input projection"),
        Contender("limit_chunk", "mlstm", _tfla("limit_chunk", chunk_size=64), "exp", "ours", False, note="L=64"),
        Contender(
            "xl_chunk_siging",
            "mlstm",
            _tfla("xl_chunk_siging", chunk_size=128),
            "sigmoid",
            "ours_sigmoid",
            False,
            note="L=128",
        ),
        Contender(
            "xl_chunk_siging_raw",
            "mlstm",
            _tfla("xl_chunk_siging", chunk_size=128, normalize=False),
            "sigmoid_raw",
            "ours_sigmoid_raw",
            note="L=128, no normaliser",
        ),
        Contender("flashrnn_cuda", "slstm", partial(_flashrnn, backend="cuda"), "slstm", "ours_slstm", compiler="nvcc"),
        Contender(
            "flashrnn_fused", "slstm", partial(_flashrnn, backend="cuda_fused"), "slstm", "ours_slstm", compiler="nvcc"
        ),
        Contender("xlstm_cell", "slstm", _xlstm_cell, "slstm", "ours_slstm", compiler="nvcc"),
    )
}


def select_peers(names: str) -> list[Contender]:
    """Peers by comma-separated names; "default" (none that needs nvcc), "nvcc", "all" and "none" are groups.

    Raises:
        ValueError: an unknown name.
    """
    groups = {
        "all": list(PEERS),
        "default": [name for name, peer in PEERS.items() if not peer.compiler and not name.endswith("_raw")],
        "nvcc": [name for name, peer in PEERS.items() if peer.compiler],
        "none": [],
    }
    chosen: dict[str, Contender] = {}
    for name in names.split(","):
        if name not in groups and name not in PEERS:
            raise ValueError(f"--peers: unknown peer {name!r}; use {', '.join(groups)} or of {', '.join(PEERS)}")
        chosen.update({member: PEERS[member] for member in groups.get(name, [name])})
    return list(chosen.values())
