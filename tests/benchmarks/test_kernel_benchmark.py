"""The kernel benchmark runs from end to end on a CPU, and refuses to time what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import worker
from benchmarks.cases import CASES, select
from benchmarks.correctness import beyond_limits, errors
from benchmarks.peers import ours, select_peers
from tests.runs import PATIENCE, ROOT, environment

CPU = torch.device("cpu")


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--timing-seconds", "0.01", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.long
def test_benchmark_writes_a_table_and_says_why_a_peer_is_missing(tmp_path):
    cases = ["--cases", "tiny_mlstm,tiny_slstm", "--peers", "xl_chunk,lstm", "--backend", "reference"]
    done = run(*cases, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    rows = {(row["case"], row["contender"]): row for row in found["rows"]}
    for key in (("tiny_mlstm", "ours"), ("tiny_mlstm", "ours_sigmoid_raw"), ("tiny_slstm", "ours_slstm")):
        assert rows[key]["both"]["median"] > 0 and rows[key]["both"]["iterations"] >= 5, rows[key]
    assert set(rows["tiny_mlstm", "ours"]["errors"]) == {"h", "q", "k", "v", "igate_preact", "fgate_preact"}
    # There is no CUDA device: with or without the package, this peer cannot run.
    assert "failure" in rows["tiny_mlstm", "xl_chunk"]
    assert found["ceilings"]["bytes_per_second"] > 0
    table = path.with_suffix(".md").read_text()
    assert "## mLSTM 2 x 8/16, S=48, B=2" in table and "| lstm |" in table
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "mlstm_9x9"], "--cases: unknown case 'mlstm_9x9'; use all, mlstm, slstm or of "),
        (["--peers", "xl"], "--peers: unknown peer 'xl'; use all, default, nvcc, none or of xl_chunk"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_a_wrong_gradient_is_not_timed(tmp_path):
    case = CASES["tiny_mlstm"]
    contender = ours("reference", {})[0]

    def wrong(case, inputs):
        call = contender.prepare(case, inputs)
        right = call.gradients
        call.gradients = lambda parts: {**right(parts), "fgate_preact": 1.02 * right(parts)["fgate_preact"]}
        return call

    broken = replace(contender, prepare=wrong)
    assert not beyond_limits(case, errors(contender, case, CPU, torch.bfloat16, seed=1))
    rows = tmp_path / "rows"
    worker.run(broken, [case], CPU, torch.bfloat16, is_ours=True, seconds=0.01, deadline=1e12, rows=rows)
    row = json.loads(rows.read_text().splitlines()[-1])
    assert row["failure"].startswith("gate: fgate_preact 2.0e-02 > 1e-02") and "both" not in row


def test_what_is_judged_is_timed(tmp_path):
    seeds = []

    class Noting(type(CASES["tiny_mlstm"])):
        def inputs(self, seed, device, dtype):
            seeds.append((self.length, seed))
            return super().inputs(seed, device, dtype)

    case = Noting(**vars(CASES["tiny_mlstm"]))
    settings = {"is_ours": False, "seconds": 0.01, "deadline": 1e12, "rows": tmp_path / "rows"}
    worker.run(ours("reference", {})[0], [case], CPU, torch.bfloat16, **settings)
    judged, *timed = seeds
    assert judged in timed and len(set(timed)) == 2


def test_an_upstream_gradient_without_the_normaliser_is_orthogonal(monkeypatch):
    """Leaving out the gradient through the normaliser is then no error, as it is behind a scale-invariant norm."""
    case = CASES["tiny_mlstm"]
    contender = ours("reference", {})[0]
    seen = []

    def prepare(case, inputs):
        call = contender.prepare(case, inputs)
        keep = call.to_upstream
        call.to_upstream = lambda dh: seen.append((dh, call.forward_only())) or keep(dh)
        return call

    found = errors(replace(contender, prepare=prepare, exact_gradients=False), case, CPU, torch.bfloat16, seed=1)
    assert not beyond_limits(case, found)
    ((dh, h),) = seen
    overlap = (dh.float() * h.float()).sum(-1).norm() / (dh.float() * h.float()).norm()
    assert overlap < 1e-2


def test_floors_are_those_of_the_7b_shape():
    """kernels of B=1, S=8192 at 4.3 TB/s and 790 TFLOP/s: counted by hand from bytes and products a token."""
    floor = CASES["mlstm_8x256_512_b1"].floors(4.3e12, 790e12, 128)
    assert floor["forward"] == pytest.approx(0.133, abs=0.001)
    assert floor["both"] == pytest.approx(0.384, abs=0.001)


def test_groups_of_peers_and_cases():
    assert not {peer.compiler for peer in select_peers("default")} - {""}
    assert {"flashrnn_cuda", "xlstm_cell"} <= {peer.name for peer in select_peers("nvcc")}
    assert select_peers("none") == []
    assert {case.kind for case in select("slstm")} == {"slstm"} and len(select("all")) == len(CASES) - 2
