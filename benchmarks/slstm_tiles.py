"""Checks and times the Triton kernels of the sLSTM for every division of the work, on one GPU.

    python -m benchmarks.slstm_tiles [--head-dims 64 128 256 512] [--seconds 400]

Every division is first compared with the reference in float64, forward and backward, and only then timed. Each head
dimension has a process of its own, which is ended if it takes too long. A line names what failed, or the worst errors
and the times at B=64, S=2048, bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

WIDTH = 1024
BATCH, LENGTH = 64, 2048
# (units, rows, warps, resident, narrow): the divisions tried for a head dimension.
CANDIDATES = {
    48: [(64, 16, 4, 1, True), (64, 16, 8, 1, True), (32, 16, 4, 1, True)],
    64: [(64, 16, 4, 1, True), (64, 16, 8, 1, True), (32, 16, 4, 1, True), (32, 32, 4, 1, True)],
    128: [(32, 16, 4, 1, True), (64, 16, 4, 1, True), (32, 32, 8, 1, True), (128, 16, 8, 1, True)],
    192: [(32, 16, 4, 1, True), (64, 16, 8, 1, True), (32, 32, 8, 1, True)],
    256: [(32, 16, 4, 1, True), (32, 16, 4, 1, False), (32, 16, 8, 1, True), (64, 16, 8, 1, True)],
    384: [(32, 32, 8, 1, True), (32, 16, 8, 1, True), (16, 32, 8, 1, True)],
    512: [(32, 32, 8, 1, True), (32, 32, 8, 1, False), (16, 64, 8, 1, True)],
}
TOLERANCES = {"h": 4e-3, "c": 4e-3, "n": 4e-3, "last h": 4e-3}
GRADIENT_TOLERANCE = 1e-2


def heads_of(head_dim: int) -> int:
    """Heads that make WIDTH units, and at least four."""
    return max(4, WIDTH // head_dim)


def relative(actual, expected) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def make_case(head_dim: int, batch: int, length: int, dtype, seed: int):
    """gates_x, recurrent_kernel, document_start, (h, c, n, m), as a layer at its start has them."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    heads = heads_of(head_dim)
    gates_x = torch.randn(batch, length, 4, heads, head_dim, device="cuda", generator=generator)
    gates_x[:, :, 1] += 3
    kernel = torch.randn(heads, head_dim, 4, head_dim, device="cuda", generator=generator) * head_dim**-0.5
    starts = torch.rand(batch, length, device="cuda", generator=generator) < 0.02
    state = [torch.randn(batch, heads, head_dim, device="cuda", generator=generator) for _ in range(4)]
    state[2] = 1 + state[2].abs()
    return gates_x.to(dtype), kernel.to(dtype), starts, state


def with_tiles(tiles: tuple[int, int, int, int, bool]):
    """The operators use these tiles from here on."""
    from kernels.slstm import triton_op
    from kernels.slstm.triton_tiles import Tiles

    triton_op.default_tiles = lambda head_dim, dtype: Tiles(*tiles)


def compare(head_dim: int, dtype, cap: float | None, batch: int = 20, length: int = 24) -> dict[str, float]:
    """Relative errors of results and gradients against the reference in float64."""
    import torch

    from kernels.slstm import SLSTMState
    from kernels.slstm.reference import slstm_recurrent
    from kernels.slstm.triton_op import slstm_triton

    gates_x, kernel, starts, state = make_case(head_dim, batch, length, dtype, 1)

    def run(form, dtype, state_dtype):
        leaves = [gates_x.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_()]
        leaves += [x.to(state_dtype).requires_grad_() for x in state[:3]]
        h, last = form(
            *leaves[:2],
            document_start=starts,
            initial_state=SLSTMState(*leaves[2:], state[3].to(state_dtype)),
            return_state=True,
            gate_soft_cap=cap,
        )
        results = {"h": h, "last h": last.h, "c": last.c, "n": last.n}
        generator = torch.Generator("cuda").manual_seed(2)
        cotangents = [torch.randn(x.shape, device="cuda", generator=generator).to(x.dtype) for x in results.values()]
        names = ["d gates", "d kernel", "d h", "d c", "d n"]
        gradients = torch.autograd.grad(list(results.values()), leaves, cotangents)
        return results | dict(zip(names, gradients, strict=True))

    expected = run(slstm_recurrent, torch.float64, torch.float64)
    actual = run(slstm_triton, dtype, torch.float32)
    return {name: relative(actual[name], value) for name, value in expected.items()}


def milliseconds(call, repeats: int = 5) -> float:
    """Median by events, after two warm-up calls."""
    import torch

    times = []
    for repeat in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def one(head_dim: int, tiles: tuple[int, int, int, int, bool], compile_only: bool) -> dict:
    """Checks, then times, one division of the work; the result can be printed as JSON."""
    import torch

    from kernels.slstm import triton_op
    from kernels.slstm.triton_tiles import Tiles

    with_tiles(tiles)
    dtype = torch.bfloat16
    result = {}
    if compile_only:
        compare(head_dim, dtype, 15.0, batch=2, length=2)
    for cap in (15.0, None):
        if compile_only:
            continue
        # Teams that take several turns, and batches that fill no tile.
        errors = compare(head_dim, dtype, cap, batch=150 if cap is None else 20)
        worst = max((error / TOLERANCES.get(name, GRADIENT_TOLERANCE), name, error) for name, error in errors.items())
        result[f"worst error, cap {cap}"] = f"{worst[1]} {worst[2]:.1e}"
        bad = {n: f"{e:.1e}" for n, e in errors.items() if not e <= TOLERANCES.get(n, GRADIENT_TOLERANCE)}
        if bad:
            return result | {"failed": str(bad)}
    batch, length = (2, 2) if compile_only else (BATCH, LENGTH)
    gates_x, kernel, _, state = make_case(head_dim, batch, length, dtype, 3)
    state = [torch.zeros_like(x) for x in state]
    grad_h = torch.randn(batch, length, *kernel.shape[:2], device="cuda", dtype=dtype)
    tiles = Tiles(*tiles)
    inputs = triton_op.CellInputs(gates_x, kernel, None, *state)

    def forward():
        return triton_op.launch_forward(tiles, inputs, None, True)

    derivatives = forward().derivatives
    grads = triton_op.OutputGradients(grad_h, *state[:3])

    def backward():
        return triton_op.launch_backward(tiles, grads, kernel, None, derivatives, dtype, False)

    backward()
    torch.cuda.synchronize()
    if compile_only:
        return result
    same = torch.equal(forward()[0], forward()[0]) and torch.equal(backward()[0], backward()[0])
    finite = backward()[0].isfinite().all().item() and forward()[0].isfinite().all().item()
    if not (same and finite):
        return result | {"failed": f"deterministic {same}, finite {finite}"}
    alone = [x[: tiles.rows, ..., :1, :].contiguous() for x in (gates_x, *state)]

    def without_derivatives():
        return triton_op.launch_forward(tiles, inputs, None, False)

    def one_team():
        return triton_op.launch_forward(
            tiles, triton_op.CellInputs(alone[0], kernel[:1], None, *alone[1:]), None, False
        )

    calls = {"forward": forward, "backward": backward, "forward only": without_derivatives, "one team": one_team}
    times = {name: milliseconds(call) for name, call in calls.items()}
    for name, gates_dtype in (("both and weights", dtype), ("the same, fp32 gates", torch.float32)):
        leaves = [gates_x.to(gates_dtype).requires_grad_(), kernel.requires_grad_()]

        def both(leaves=leaves):
            h, _ = triton_op.slstm_triton(*leaves)
            return torch.autograd.grad(h, leaves, grad_h.to(h.dtype))

        times[name] = milliseconds(both)
    steps = {f"us a step {name}": 1000 * times[name] / length for name in calls}
    return result | {name: round(value, 2) for name, value in (times | steps).items()}


def peers() -> None:
    """torch.nn.LSTM of the widths of four heads of 256 and of 512, in the same run."""
    import torch

    for width in (WIDTH, 2 * WIDTH):
        lstm = torch.nn.LSTM(width, width, batch_first=True, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(BATCH, LENGTH, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)

        def forward(lstm=lstm, x=x):
            with torch.no_grad():
                return lstm(x)[0]

        def both(lstm=lstm, x=x, grad=grad):
            return torch.autograd.grad(lstm(x)[0], [x, *lstm.parameters()], grad)

        times = f"forward {milliseconds(forward):.2f} ms, forward + backward {milliseconds(both):.2f} ms"
        print(f"torch.nn.LSTM, hidden {width}: {times}", flush=True)


def name_of(head_dim: int, tiles) -> str:
    units, rows, warps, resident, narrow = tiles
    messages = "bf16" if narrow else "fp32"
    division = f"units {units:3} rows {rows} warps {warps} resident {resident} messages {messages}"
    return f"{heads_of(head_dim):2} x {head_dim:3}: {division}"


def child(head_dim: int, divisions: list, timeout: float, compile_only: bool = False) -> None:
    """`one` for each of `divisions`, in a process of their own; prints a line for each as it comes."""
    task = json.dumps([head_dim, divisions, compile_only])
    command = [sys.executable, "-m", "benchmarks.slstm_tiles", "--one", task]
    try:
        done = subprocess.run(command, timeout=timeout, stderr=subprocess.PIPE, text=True)
        problem = done.stderr[-1500:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"not done within {timeout:.0f} s"
    if problem:
        print(f"heads x {head_dim}, {divisions}: {problem}", flush=True)


def run_child(head_dim: int, divisions: list, compile_only: bool) -> None:
    for tiles in divisions:
        try:
            result = one(head_dim, tuple(tiles), compile_only)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        if result:
            line = ", ".join(f"{key} {value}" for key, value in result.items())
            print(f"{name_of(head_dim, tiles)}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[256, 512, 64, 128, 384, 192, 48])
    parser.add_argument("--seconds", type=float, default=400, help="no head dimension starts after this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peers", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_child(*json.loads(arguments.one))
        return
    if arguments.peers:
        peers()
        return
    import torch
    import triton

    began = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    cases = [(head_dim, [tiles]) for head_dim in arguments.head_dims for tiles in CANDIDATES[head_dim]]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    # Compiling takes far longer than running; the compiled kernels are kept in Triton's cache for what follows.
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda case: child(*case, timeout=100, compile_only=True), cases))
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.slstm_tiles", "--peers"], timeout=120)
    for head_dim in arguments.head_dims:
        if time.monotonic() - began > arguments.seconds:
            print(f"heads x {head_dim}: left out, time is up", flush=True)
        else:
            child(head_dim, CANDIDATES[head_dim], timeout=120)
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
