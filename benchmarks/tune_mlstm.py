"""Finds the fastest tiles of the mLSTM's kernels for a GPU, among those that pass against the reference.

    python -m benchmarks.tune_mlstm --report times.json [--shapes 8,8192,8,256,512 ...]

Each kernel is timed by itself on random inputs, for each chunk size; a tile is a candidate only if forward and backward
with it agree with the float64 reference. The report has every time, and the best tiles of each chunk size with the sums
of their times. The table of this GPU in kernels/mlstm/chunkwise/tuned/ gets the tiles of the fastest chunk size, for
many sequences and for few (one sequence of the batch), which are summed in the same order. At the end the mLSTM's tests
run with the new table; where one fails, or the tuning before it, the table is left as it was.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import ROOT
from kernels.mlstm import mlstm
from kernels.mlstm.chunkwise import launch, launch_backward, problem, tiles
from kernels.mlstm.chunkwise.gates import ADDED
from kernels.mlstm.chunkwise.launch import Ends, Factors
from kernels.mlstm.chunkwise.problem import Documents, Problem
from kernels.mlstm.chunkwise.read_out import MATRIX_WEIGHT, VECTOR_WEIGHT
from kernels.mlstm.chunkwise.tiles import Tile, Tiles
from kernels.mlstm.inputs import CellSettings, cell_inputs

FORWARD = ("states", "scores", "read_out")
# The recurrence runs again for the states, and once against time for their gradients.
BACKWARD = ("states", "states", "score_gradients", "gradients")
STAGES = tuple(dict.fromkeys(FORWARD + BACKWARD))
CHUNKS = (64, 128, 256)
# ms of trial runs and of timed runs.
REPETITION = {"warmup": 4, "rep": 15, "return_mode": "median"}
# What a table must pass.
SUITE = ("-m", "pytest", "-q", "-m", "gpu", "tests/kernels/interpreted/test_mlstm_chunkwise.py")
LIMITS = {"h": 4e-3, "q": 6e-3, "k": 6e-3, "v": 6e-3, "i": 6e-3, "f": 1e-2}


def _grid(rows, columns, inner, tokens, warps_and_stages) -> list[Tile]:
    return [
        Tile(r, c, i, t, w, s)
        for r in rows
        for c in columns
        for i in inner
        for t in tokens
        for w, s in warps_and_stages
        if not (r * c >= 128 * 256 and w == 4) and not (r * c <= 64 * 64 and w == 8)
    ]


def candidates(stage: str, chunk: int, like: Tiles | None = None) -> list[Tile]:
    """Tiles worth a trial for a kernel; of those, with `like`, the ones that sum in the same order as its tiles."""
    if like is not None:
        same = getattr(like, stage)
        if stage not in ("states", "read_out"):
            return [same]
        return [t for t in candidates(stage, chunk) if (t.inner, t.tokens) == (same.inner, same.tokens)]
    if stage == "states":
        found = _grid((64, 128), (128, 256), (16,), (64, 128), ((4, 3), (8, 3), (8, 2), (8, 4)))
        return [t for t in found if t.tokens <= chunk]
    if stage in ("scores", "score_gradients"):
        found = _grid((64, 128), (64, 128), (64, 128), (16,), ((4, 3), (8, 3), (4, 2), (8, 2)))
    else:
        found = _grid((64, 128), (128, 256), (64,), (64,), ((4, 3), (8, 3), (4, 4), (8, 4), (8, 2)))
        found += [Tile(128, 128, 128, 128, 8, 2), Tile(64, 128, 32, 32, 4, 4), Tile(128, 128, 32, 32, 8, 5)]
    return [t for t in found if t.rows <= chunk and t.tokens <= t.rows and (t.columns <= chunk or "score" not in stage)]


class Stages:
    """One call of each kernel on the inputs of a shape."""

    def __init__(self, shape: tuple[int, ...], base: Tiles, device: str):
        batch, length, heads, key_dim, value_dim = shape
        options = {"device": device, "dtype": torch.bfloat16}
        make = torch.randn if device == "cuda" else torch.empty
        self.q, self.k = (make(batch, length, heads, key_dim, **options) for _ in range(2))
        self.v, self.grad_h = (make(batch, length, heads, value_dim, **options) for _ in range(2))
        self.igate, self.fgate = (make(batch, length, heads, device=device) for _ in range(2))
        if device == "cuda":
            self.igate -= 10
            self.fgate += 4.5
        self.inputs = cell_inputs(self.k, self.v, self.igate, self.fgate)
        self.documents = Documents(None, None)
        fitted = tiles.fit(base, key_dim, value_dim)
        self.problem = Problem(batch, length, heads, key_dim, value_dim, fitted, CellSettings())

    def prepare(self) -> None:
        """Run everything once, so that each stage has its inputs."""
        p = self.problem
        self.packed, self.decay, _ = self.weights(p)
        self.entering = self.states(p)
        self.scores_, self.normaliser = launch.scores(
            p, self.q, self.k, self.packed, self.entering.vectors, self.documents
        )
        self.h = self.read_out(p)
        self.rows = launch_backward.row_weights(p, self.h, self.grad_h, self.packed, self.normaliser)
        self.leaving = self.gradient_states(p)
        self.scaled, self.grad_scores, _ = self.score_gradients(p)

    def weights(self, p):
        return launch.weights(p, self.inputs, self.documents, 0.0)

    def states(self, p):
        w = self.packed[ADDED]
        return launch.states(p, Factors(self.k, self.v, w, w), self.decay, Ends(None, None))

    def gradient_states(self, p):
        factors = Factors(self.q, self.grad_h, self.rows[MATRIX_WEIGHT], self.rows[VECTOR_WEIGHT])
        return launch.states(p, factors, self.decay, Ends(None, None), backwards=True)

    def scores(self, p):
        return launch.scores(p, self.q, self.k, self.packed, self.entering.vectors, self.documents)

    def read_out(self, p):
        return launch.read_out(p, self.q, self.v, self.packed, self.normaliser, self.entering.matrices, self.scores_)

    def score_gradients(self, p):
        return launch_backward.score_gradients(
            p, self.q, self.inputs, self.grad_h, self.packed, self.rows, self.documents
        )

    def gradients(self, p):
        reading = launch_backward.Reading(self.q, self.grad_h, self.rows, self.scaled, self.grad_scores)
        return launch_backward.token_gradients(
            p, self.inputs, reading, self.packed, self.decay, self.entering, self.leaving
        )

    def run(self, stage: str, tile: Tile):
        """Call one kernel with a tile."""
        p = dataclasses.replace(self.problem, tiles=with_tile(self.problem.tiles, stage, tile))
        return getattr(self, stage)(p)


def with_tile(base: Tiles, stage: str, tile: Tile) -> Tiles:
    """The same cut but for one kernel."""
    return dataclasses.replace(base, **{stage: tile})


def base_tiles(chunk: int) -> Tiles:
    """The untuned cut with another chunk size."""
    rows = min(128, chunk)
    changed = {
        field.name: dataclasses.replace(
            tile, rows=rows, columns=min(tile.columns, chunk) if "score" in field.name else tile.columns
        )
        for field in dataclasses.fields(Tiles)
        if isinstance(tile := getattr(tiles.SIXTEEN_BIT, field.name), Tile) and field.name != "states"
    }
    states = dataclasses.replace(tiles.SIXTEEN_BIT.states, tokens=rows)
    return dataclasses.replace(tiles.SIXTEEN_BIT, chunk=chunk, states=states, **changed)


def _compile(job) -> str | None:
    """Compile one kernel in a process that has no GPU, into the cache on disk; says why it failed."""
    shape, chunk, stage, tile = job
    import triton

    from tests.kernels.compile_gate import hopper_without_gpu

    try:
        hopper_without_gpu()
        stages = Stages((1, *shape[1:]), base_tiles(chunk), "cpu")
        stages.prepare()
        if stage is not None:
            stages.run(stage, tile)
        return None
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        del triton


def tune(shape: tuple[int, ...], chunks: list[int], seconds: float, like: Tiles | None = None) -> dict:
    """Best tiles and all times, ms, for one shape and each chunk size; `like` as for `candidates`."""
    from triton.testing import do_bench

    report: dict = {"shape": shape, "chunks": {}}
    end = time.monotonic() + seconds
    for chunk in chunks:
        base = base_tiles(chunk)
        stages = Stages(shape, base, "cuda")
        stages.prepare()
        times: dict[str, list] = {}
        best: dict[str, tuple[float, Tile]] = {}
        for stage in STAGES:
            times[stage] = measured = {}
            for tile in candidates(stage, chunk, like):
                fitted = tiles.fit(with_tile(base, stage, tile), shape[3], shape[4])
                tile = getattr(fitted, stage)
                if tile in measured or time.monotonic() > end:
                    continue
                try:
                    measured[tile] = do_bench(partial(stages.run, stage, tile), **REPETITION)
                except Exception as error:  # noqa: BLE001
                    measured[tile] = type(error).__name__
            ranked = sorted(
                (ms, number, tile) for number, (tile, ms) in enumerate(measured.items()) if isinstance(ms, float)
            )
            for ms, _, tile in ranked:
                if check(with_tile(base, stage, tile), shape):
                    best[stage] = (ms, tile)
                    break
                measured[tile] = f"wrong: {ms}"
        if lacking := [stage for stage in STAGES if stage not in best]:
            raise SystemExit(
                f"{shape}, chunk {chunk}: no tile of {', '.join(lacking)} was timed and right; where the time ran out, "
                f"raise --seconds ({seconds / len(chunks):g})"
            )
        small = {name: do_bench(call, **REPETITION) for name, call in other_kernels(stages).items()}
        report["chunks"][chunk] = {
            "best": {stage: [ms, dataclasses.asdict(tile)] for stage, (ms, tile) in best.items()},
            "other": small,
            "times": {s: [[dataclasses.asdict(t), ms] for t, ms in m.items()] for s, m in times.items()},
        }
        forward = sum(best[s][0] for s in FORWARD) + small["weights"]
        backward = sum(best[s][0] for s in BACKWARD) + small["row_weights"]
        print(f"\n{shape} chunk {chunk}: forward {forward:.3f} ms, backward with recomputed states {backward:.3f} ms")
        for stage, (ms, t) in best.items():
            tried = list(times[stage].values())
            wrong = sum(isinstance(x, str) and x.startswith("wrong") for x in tried)
            failed = sum(isinstance(x, str) for x in tried) - wrong
            cut = f"{t.rows}x{t.columns} inner {t.inner} tokens {t.tokens} warps {t.warps} stages {t.stages}"
            print(f"  {stage:16s} {ms:.3f}  {cut}   ({len(tried)} tried, {failed} failed, {wrong} wrong)")
        whole = time_whole(base, {stage: tile for stage, (_, tile) in best.items()}, stages)
        report["chunks"][chunk]["whole"] = whole
        print(f"  whole operator: forward {whole[0]:.3f}, forward + backward {whole[1]:.3f} ms")
        print("  other", {k: round(v, 3) for k, v in small.items()}, flush=True)
    return report


def time_whole(base: Tiles, best: dict[str, Tile], stages: Stages) -> tuple[float, float]:
    """ms of the operator's forward pass, and of both passes, with the best tiles."""
    from triton.testing import do_bench

    cut = dataclasses.replace(base, **best)
    inputs = [x.clone().requires_grad_() for x in (stages.q, stages.k, stages.v, stages.igate, stages.fgate)]

    def forward():
        with torch.no_grad():
            mlstm(*inputs, backend="triton")

    def both():
        h, _ = mlstm(*inputs, backend="triton")
        torch.autograd.grad(h, inputs, stages.grad_h)

    choose = problem.choose_tiles
    problem.choose_tiles = lambda *_: cut
    try:
        return do_bench(forward, **REPETITION), do_bench(both, **REPETITION)
    finally:
        problem.choose_tiles = choose


def other_kernels(stages: Stages) -> dict:
    """The kernels without a choice of tiles."""
    p = stages.problem
    return {
        "weights": lambda: stages.weights(p),
        "row_weights": lambda: launch_backward.row_weights(
            p, stages.h, stages.grad_h, stages.packed, stages.normaliser
        ),
    }


_expected: dict = {}


def _check_inputs(dims):
    torch.manual_seed(0)
    shape = (1, 600, 2)
    q, k = (torch.randn(*shape, dims[0], device="cuda").bfloat16() for _ in range(2))
    v, grad = (torch.randn(*shape, dims[1], device="cuda").bfloat16() for _ in range(2))
    gates = torch.randn(*shape, device="cuda"), torch.randn(*shape, device="cuda") + 3
    starts = torch.rand(shape[:2], device="cuda") < 0.01
    return [x.requires_grad_() for x in (q, k, v, *gates)], grad, starts


def check(cut: Tiles, shape: tuple[int, ...]) -> bool:
    """Whether forward and backward with these tiles agree with the reference in float64."""
    dims = shape[3:]
    inputs, grad, starts = _check_inputs(dims)
    if dims not in _expected:
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        h, _ = mlstm(*doubles, document_start=starts, backend="reference")
        _expected[dims] = [h.detach(), *torch.autograd.grad(h, doubles, grad.double())]
    fitted = tiles.fit(cut, *dims)
    choose = problem.choose_tiles
    problem.choose_tiles = lambda *_: fitted
    try:
        h, _ = mlstm(*inputs, document_start=starts, backend="triton")
        actual = [h.detach(), *torch.autograd.grad(h, inputs, grad)]
    finally:
        problem.choose_tiles = choose
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, _expected[dims], strict=True)]
    return all(error <= limit for error, limit in zip(errors, LIMITS.values(), strict=True))


def add_to_table(path: Path, device: str, found: dict, versions: dict[str, str]) -> Tiles:
    """Write what `tune` found for a shape into a table, by its fastest chunk size; returns those tiles."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"device": device, "entries": []}
    batch, _, heads, key_dim, value_dim = found["shape"]
    chunk, best = min(found["chunks"].items(), key=lambda item: item[1]["whole"][1])
    cut = {"chunk": chunk} | {stage: tile for stage, (_, tile) in best["best"].items()}
    place = {"key_dim": key_dim, "value_dim": value_dim, "few_sequences": batch * heads <= tiles.FEW_SEQUENCES}
    others = [entry for entry in table["entries"] if any(entry[key] != value for key, value in place.items())]
    entry = {**place, "shape": list(found["shape"]), **versions, "tiles": cut}
    table["entries"] = sorted([*others, entry], key=lambda e: (-e["key_dim"], -e["value_dim"], e["few_sequences"]))
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return tiles.parse_tiles(cut)


@contextmanager
def kept_if_right(path: Path) -> Iterator[None]:
    """Run the suite with what is written to the table at `path`; where anything fails, put back what was there."""
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        yield
        if subprocess.run([sys.executable, *SUITE], cwd=ROOT, check=False).returncode:
            raise SystemExit(f"{path} is as it was: with the new tiles the tests above fail")
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(before, encoding="utf-8")
        raise


def main() -> None:
    """Compile every candidate in parallel, then check and time each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="where every time is written")
    parser.add_argument("--shapes", nargs="*", default=["8,8192,8,256,512", "8,8192,16,128,256", "8,8192,6,64,128"])
    parser.add_argument("--chunks", nargs="*", type=int, default=list(CHUNKS))
    parser.add_argument("--seconds", type=float, default=120, help="for the timing of each shape and chunk size")
    arguments = parser.parse_args()
    shapes = [tuple(int(x) for x in text.split(",")) for text in arguments.shapes]
    start = time.monotonic()
    dims = {shape[3:]: shape for shape in shapes}
    jobs = [
        (shape, chunk, stage, tile)
        for shape in dims.values()
        for chunk in arguments.chunks
        for stage in STAGES
        for tile in candidates(stage, chunk)
    ]
    first = [(shape, chunk, None, None) for shape in dims.values() for chunk in arguments.chunks]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        failures = [x for x in pool.map(_compile, first, chunksize=1) if x]
        failures += [x for x in pool.map(_compile, jobs, chunksize=4) if x]
    print(
        f"{len(jobs)} candidates compiled in {time.monotonic() - start:.0f} s, {len(failures)} did not", set(failures)
    )
    versions = {"torch": torch.__version__, "triton": __import__("triton").__version__}
    report = {"device": torch.cuda.get_device_name(), **versions, "shapes": []}
    table = tiles.table_path(report["device"])
    with kept_if_right(table):
        for shape in shapes:
            like = None
            for batch in (shape[0], 1) if shape[2] <= tiles.FEW_SEQUENCES else (shape[0],):
                few = (batch, *shape[1:])
                chunks = arguments.chunks if like is None else [like.chunk]
                report["shapes"].append(tune(few, chunks, arguments.seconds * len(chunks), like))
                arguments.report.write_text(json.dumps(report, indent=1))
                like = add_to_table(table, report["device"], report["shapes"][-1], versions)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
