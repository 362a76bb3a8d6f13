"""The fused loss, head norm and mLSTM step beside plain PyTorch, eager and compiled, in one run on a CUDA device.

    python -m benchmarks.fused_kernels [loss] [head_norm] [step] [tiles]

Each part first holds the results against the reference. Times are medians over inputs that are larger than the L2 cache
in sum; bandwidths are shares of a large copy that is measured in the same run. `tiles` times other block shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.cross_entropy import fused as loss_fused
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_sum, rows
from kernels.head_norm import fused as norm_fused
from kernels.head_norm import gated_head_norm
from kernels.mlstm import MLSTMState, step_fused
from kernels.mlstm.step import DecodingState, mlstm_step

DEVICE = "cuda"
# Several times the L2 cache of an H200.
COLD_BYTES = 256 * 2**20
VOCABULARY, CAP = 50304, 30.0


def milliseconds(calls: list[Callable[[], object]], repetitions: int = 30) -> float:
    """Median time of a call, in turn over `calls`, with the host out of the way."""
    for call in calls:
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for number, (start, end) in enumerate(events):
        # The host issues the call while the device is busy with this.
        torch.cuda._sleep(4_000_000)
        start.record()
        calls[number % len(calls)]()
        end.record()
        torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repetitions // 2]


def graph_milliseconds(calls: list[Callable[[], object]], repetitions: int = 30) -> float:
    """Median time of one of `calls` when all of them run one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    time = milliseconds([graph.replay], repetitions) / len(calls)
    del results
    return time


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**28, device=DEVICE).fill_(1.0)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * milliseconds([lambda: target.copy_(source)]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def check(name: str, actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Print the errors; no time is reported of what is wrong."""
    errors = {part: relative_error(actual[part], value) for part, value in expected.items()}
    print(f"{name}: " + ", ".join(f"{part} {error:.1e}" for part, error in errors.items()))
    if not all(error <= tolerance for error in errors.values()):
        raise SystemExit(f"{name}: relative error above {tolerance:.0e}")


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = CAP * torch.tanh((hidden @ weight.t()).float() / CAP)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def loss() -> None:
    """Forward and backward of the summed loss, bf16; the floor is its three matrix products alone."""
    print(f"\nloss, V = {VOCABULARY}, soft cap {CAP:g}, bf16, forward + backward (ms; peak GiB beyond inputs)")
    names = ("sum", "per token", "reference", "compiled", "eager")
    print(f"{'tokens x D':>16} {'3 products':>11} " + " ".join(f"{name:>14}" for name in names))
    for tokens, width in [(16384, 1024), (16384, 2048), (8192, 4096)]:
        torch.manual_seed(0)
        hidden = torch.randn(1, tokens, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(VOCABULARY, width, device=DEVICE) * width**-0.5).to(torch.bfloat16).requires_grad_()
        targets = torch.randint(0, VOCABULARY, (1, tokens), device=DEVICE)
        targets[:, ::10] = -100

        def both(function, hidden=hidden, weight=weight, targets=targets):
            total = function(hidden, weight, targets)
            return total, *torch.autograd.grad(total / targets.numel(), [hidden, weight])

        forms = {
            "sum": lambda *x: linear_cross_entropy_sum(*x, soft_cap=CAP, backend="triton"),
            "per token": lambda *x: linear_cross_entropy(*x, soft_cap=CAP, backend="triton").sum(),
            "reference": lambda *x: linear_cross_entropy(*x, soft_cap=CAP, backend="reference").sum(),
            "compiled": torch.compile(_plain_loss),
            "eager": _plain_loss,
        }
        parts = ("loss", "d hidden", "d weight")
        expected = dict(zip(parts, both(forms["reference"]), strict=True))
        for name in ("sum", "per token"):
            check(f"  {name}", dict(zip(parts, both(forms[name]), strict=True)), expected, 1e-2)
        flat, fixed = hidden.detach()[0], weight.detach()
        buffer = torch.empty(4096, VOCABULARY, device=DEVICE, dtype=torch.bfloat16)
        grad_weight = torch.zeros(weight.shape, device=DEVICE)

        def products(flat=flat, fixed=fixed, buffer=buffer, grad_weight=grad_weight):
            for part in flat.split(len(buffer)):
                torch.mm(part, fixed.t(), out=buffer)
                torch.mm(buffer, fixed)
                torch.addmm(grad_weight, buffer.t(), part, out_dtype=torch.float32, out=grad_weight)

        cells = [f"{milliseconds([products], 10):11.3f}"]
        for form in forms.values():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both(form)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            cells.append(f"{milliseconds([lambda form=form: both(form)], 10):8.3f} {peak:5.2f}")
        print(f"{f'{tokens} x {width}':>16} {' '.join(cells)}")


def head_norm(bandwidth: float) -> None:
    """Forward, and forward + backward, of the gated head norm, bf16."""
    print("\ngated head norm, bf16 (ms, share of copy bandwidth: 3 tensors forward, 5 backward)")
    print(f"{'B S NH DV':>18} {'pass':>9} {'ours':>14} {'compiled':>14} {'eager':>14}")
    for batch, length, heads, head_dim in [(1, 8192, 8, 512), (8, 8192, 8, 512), (8, 2048, 4, 256), (8, 2048, 4, 192)]:
        bytes_each = batch * length * heads * head_dim * 2
        sets = []
        for seed in range(max(2, COLD_BYTES // bytes_each)):
            torch.manual_seed(seed)
            h = torch.randn(batch, length, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
            sets.append(
                [x.requires_grad_() for x in (h, torch.randn_like(h).flatten(2), torch.rand_like(h[0, 0]).flatten())]
            )

        def plain(h, gate_preact, weight):
            norm = F.layer_norm(h.float(), h.shape[-1:], eps=1e-6).flatten(-2) * weight.float()
            return (torch.sigmoid(gate_preact.float()) * norm).to(h.dtype)

        forms = {
            "ours": lambda *x: gated_head_norm(*x, eps=1e-6, backend="triton"),
            "compiled": torch.compile(plain),
            "eager": plain,
        }

        def both(form, inputs):
            y = form(*inputs)
            return y, *torch.autograd.grad(y, inputs, inputs[1])

        parts = ("y", "d h", "d gate", "d weight")
        results = (dict(zip(parts, both(forms[name], sets[0]), strict=True)) for name in ("ours", "eager"))
        check("  ours", *results, 1e-2)
        for name, tensors, run in (("forward", 3, lambda form, inputs: form(*inputs)), ("both", 8, both)):
            cells = []
            for form in forms.values():
                with torch.set_grad_enabled(name == "both"):
                    time = milliseconds(
                        [lambda form=form, inputs=inputs, run=run: run(form, inputs) for inputs in sets]
                    )
                cells.append(f"{time:8.3f} {tensors * bytes_each / (1e-3 * time) / bandwidth:5.0%}")
            print(f"{f'{batch} {length} {heads} {head_dim}':>18} {name:>9} {' '.join(cells)}")


def _step_sets(batch: int, heads: int, key_dim: int, value_dim: int, columns: int | None = None) -> list[tuple]:
    """Inputs and states of enough layers to be cold, at most 64."""
    state_bytes = batch * heads * key_dim * value_dim * 4
    sets = []
    for seed in range(min(64, max(2, COLD_BYTES // state_bytes))):
        torch.manual_seed(seed)

        def random(*shape, dtype=torch.float32):
            return torch.randn(batch, heads, *shape, device=DEVICE).to(dtype)

        q, k, v = (random(width, dtype=torch.bfloat16) for width in (key_dim, key_dim, value_dim))
        state = DecodingState.of(MLSTMState(random(key_dim, value_dim), random(key_dim), random()), columns)
        sets.append((q, k, v, random() - 4, random() + 4, state))
    return sets


def step(bandwidth: float) -> None:
    """One token through a layer, bf16 inputs, fp32 state; many layers in one CUDA graph."""
    print(
        "\nmLSTM step in a CUDA graph (us a layer; share of copy bandwidth; and of copies of the same size in a graph)"
    )
    print(f"{'B NH DK DV':>18} {'ours':>9} {'GB/s':>6} {'share':>6} {'of copies':>9} {'reference':>10}")
    for batch, heads, key_dim, value_dim in [
        (1, 8, 256, 512),
        (4, 8, 256, 512),
        (16, 8, 256, 512),
        (64, 8, 256, 512),
        (1, 4, 128, 256),
        (64, 4, 128, 256),
    ]:
        sets = _step_sets(batch, heads, key_dim, value_dim)
        *inputs, state = sets[0]
        states = [DecodingState(*(x.clone() for x in vars(state).values())) for _ in range(2)]
        h = mlstm_step(*inputs, states[0], backend="triton")
        expected = mlstm_step(*inputs, states[1], backend="reference")
        check("  step", {"h": h, **vars(states[0])}, {"h": expected, **vars(states[1])}, 4e-3)
        moved = 2 * (state.C.nbytes + state.n.nbytes // state.n.shape[2])
        ours = graph_milliseconds([lambda x=x: mlstm_step(*x, backend="triton") for x in sets])
        targets = [torch.empty_like(x[-1].C) for x in sets[: max(2, len(sets) // 2)]]
        pairs = [(target, x[-1].C) for target, x in zip(targets, sets, strict=False)]
        copies = graph_milliseconds([lambda t=t, s=s: t.copy_(s) for t, s in pairs])
        plain = graph_milliseconds([lambda x=x: mlstm_step(*x, backend="reference") for x in sets])
        rate, shape = moved / (1e-3 * ours), f"{batch} {heads} {key_dim} {value_dim}"
        print(
            f"{shape:>18} {1e3 * ours:9.2f} {rate / 1e9:6.0f} {rate / bandwidth:6.0%} {copies / ours:9.0%} "
            f"{1e3 * plain:10.2f}"
        )
        del sets, targets, pairs


def tiles(bandwidth: float) -> None:
    """Other block shapes than the ones in use, for all three."""
    print("\nblock shapes")
    logits = torch.randn(4096, VOCABULARY, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (4096,), device=DEVICE)
    losses = torch.empty(4096, device=DEVICE)
    used = dict(rows.TILE)
    for lines, lanes, warps in [
        (1, 2048, 8),
        (2, 2048, 8),
        (4, 1024, 4),
        (2, 1024, 4),
        (1, 4096, 16),
        (2, 4096, 16),
        (1, 8192, 32),
    ]:
        rows.TILE.update(LINES=lines, LANES=lanes, num_warps=warps)
        time = milliseconds([lambda: rows.store_losses_and_gradients(logits, targets, losses, CAP, 0.0)])
        share = 2 * logits.nbytes / (1e-3 * time) / bandwidth
        print(f"  loss rows {lines} x {lanes}, {warps} warps: {time:.3f} ms, {share:.0%} of the bandwidth")
    rows.TILE.update(used)
    for tokens, width in [(16384, 1024), (8192, 4096)]:
        hidden = torch.randn(1, tokens, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(VOCABULARY, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, VOCABULARY, (1, tokens), device=DEVICE)
        for chunk in (2048, 4096, 8192):
            settings = {"soft_cap": CAP, "chunk_tokens": chunk, "backend": "triton"}
            time = milliseconds([partial(linear_cross_entropy_sum, hidden, weight, targets, **settings)], 10)
            print(f"  loss {tokens} x {width}, chunks of {chunk}: forward with gradients {time:.3f} ms")
    h = torch.randn(1, 8192, 8, 512, device=DEVICE, dtype=torch.bfloat16)
    arguments = (h, torch.randn_like(h).flatten(2), torch.rand_like(h[0, 0]).flatten())
    used = norm_fused._FORWARD_WARPS, norm_fused._BACKWARD_WARPS, norm_fused.TOKENS_PER_PARTIAL, norm_fused._STAGES
    for warps in (1, 2, 4, 8):
        norm_fused._FORWARD_WARPS = warps
        time = milliseconds([lambda: norm_fused.launch_forward(*arguments, 1e-6)])
        print(f"  head norm forward, {warps} warps: {time:.3f} ms, {3 * h.nbytes / (1e-3 * time) / bandwidth:.0%}")
    for warps, tokens, stages in [(1, 32, 3), (1, 32, 1), (1, 32, 2), (1, 16, 3), (1, 64, 3), (2, 32, 3), (4, 64, 3)]:
        norm_fused._BACKWARD_WARPS, norm_fused.TOKENS_PER_PARTIAL, norm_fused._STAGES = warps, tokens, stages
        time = milliseconds([lambda: norm_fused.launch_backward(arguments[1], *arguments, 1e-6)])
        share = 5 * h.nbytes / (1e-3 * time) / bandwidth
        print(f"  head norm backward, {warps} warps, {tokens} tokens, {stages} stages: {time:.3f} ms, {share:.0%}")
    norm_fused._FORWARD_WARPS, norm_fused._BACKWARD_WARPS, norm_fused.TOKENS_PER_PARTIAL, norm_fused._STAGES = used
    used = step_fused.NUM_WARPS
    for batch in (1, 64):
        for columns, warps in [(32, 8), (32, 4), (32, 16), (16, 4), (16, 8), (64, 8), (64, 16)]:
            sets = _step_sets(batch, 8, 256, 512, columns)
            step_fused.NUM_WARPS = warps
            time = graph_milliseconds([lambda x=x: mlstm_step(*x, backend="triton") for x in sets])
            share = 2 * sets[0][-1].C.nbytes / (1e-3 * time) / bandwidth
            print(f"  step B={batch} {columns} columns, {warps} warps: {1e3 * time:.2f} us, {share:.0%}")
            del sets
    step_fused.NUM_WARPS = used


def main(parts: list[str]) -> None:
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"copy {bandwidth / 1e12:.2f} TB/s, chunk of {loss_fused.CHUNK_TOKENS} tokens"
    )
    for name in parts or ["loss", "head_norm", "step", "tiles"]:
        part = {"loss": lambda _: loss(), "head_norm": head_norm, "step": step, "tiles": tiles}[name]
        part(bandwidth)


if __name__ == "__main__":
    main(sys.argv[1:])
