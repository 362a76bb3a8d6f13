"""Where the parameters of a model lie once DeepSpeed has laid them into flat tensors."""

import json

import pytest

from tests.runs import TINY_RUN, run_script

# Biases of three heads: 6 bytes in bfloat16.
MODEL = [
    *(setting for setting in TINY_RUN if "slstm" not in setting and "n_heads" not in setting),
    "model.d_model=48",
    "model.mlstm.n_heads=3",
    "model.slstm_at=[]",
    "model.slstm=null",
    "precision=bf16",
    "training.compile=false",
]
ADDRESSES = """
import json
import sys
from datetime import timedelta

import torch

from conf import compose
from data_pipeline.reading.batch import Batch
from model.blocks import Block
from train.__main__ import end_process
from train.config import RunConfig
from train.parallel.engine import make_engine
from train.parallel.mesh import join_mesh
from train.plan import make_plan
from train.restore import drawn_weights

mesh = join_mesh(timedelta(seconds=900))
tokens = torch.zeros(2, 32, dtype=torch.int64)
batch = Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.bool), ["a", "a"])
for stage in (0, 1, 2, 3):
    config = compose(RunConfig, "train", [*sys.argv[1:], f"parallel=zero{stage}"])
    engine = make_engine(config, make_plan(config, mesh.size), mesh)
    engine.fill(drawn_weights(config), 0)
    seen = {}

    def look(block, arguments):
        for name, parameter in block.named_parameters():
            seen[f"{block.statistics_name}.{name}"] = [parameter.numel(), parameter.data_ptr() % 16]

    for block in engine.model.blocks:
        # Behind DeepSpeed's own, which gathers what is taken apart.
        block.register_forward_pre_hook(look)
    engine.evaluate_batch(batch)
    sys.stdout.write(json.dumps([stage, seen]) + "\\n")
    sys.stdout.flush()
    engine.close()
mesh.close()
end_process(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_block_finds_its_weights_where_wide_loads_may_begin(tmp_path, processes):
    """Kernels that the blocks share are compiled for the addresses of the first."""
    (tmp_path / "addresses.py").write_text(ADDRESSES)
    overrides = [*MODEL, "name=x", "corpus.directory=y", "training.total_steps=1"]
    done = run_script(tmp_path / "addresses.py", overrides, processes=processes)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert sorted(stage for stage, _ in found) == sorted([0, 1, 2, 3] * processes)
    for stage, seen in found:
        assert {name.split(".")[1] for name in seen} == {"00", "01", "02"}
        assert [seen[f"blocks.01.mixer.{gate}.bias"][0] for gate in ("igate", "fgate")] == [3, 3]
        astray = {name: rest for name, (numel, rest) in seen.items() if numel % 8 == 0 and rest}
        assert not astray, f"ZeRO-{stage}: {astray}"
