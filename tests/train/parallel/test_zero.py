"""What of a checkpoint an engine reads, under each ZeRO stage."""

import json

import pytest

from conf import compose
from model.accounting import count_parameters, parameter_shapes
from tests.runs import TINY_RUN, run_script
from train.config import RunConfig

READS = """
import json
import sys
from datetime import timedelta

from conf import compose
from model.accounting import parameter_shapes
from train.__main__ import end_process
from train.config import RunConfig
from train.parallel.engine import make_engine
from train.parallel.mesh import join_mesh
from train.plan import make_plan
from train.restore import drawn_weights

mesh = join_mesh(timedelta(seconds=900))
for stage in (0, 1, 2, 3):
    config = compose(RunConfig, "train", [*sys.argv[1:], f"parallel=zero{stage}"])
    engine = make_engine(config, make_plan(config, mesh.size), mesh)
    drawn, reads = drawn_weights(config), []

    def read(name, offset, numel):
        reads.append((name, offset, numel))
        return drawn(name, offset, numel)

    engine.fill(read, 0)
    held = [(fragment.name, fragment.offset, fragment.numel) for fragment in engine.fragments]
    shapes = parameter_shapes(config.model)
    for fragment in engine.fragments:
        assert fragment.shape == shapes[fragment.name]
        expected = drawn(fragment.name, fragment.offset, fragment.numel)
        assert (fragment.master == expected).all() and (fragment.compute == expected).all(), fragment.name
    owned = [part for part, fragment in zip(held, engine.fragments) if fragment.owned]
    found = mesh.gather_objects((stage, reads, held, owned), group="world")
    if mesh.is_main:
        print(json.dumps(found), flush=True)
    engine.close()
mesh.close()
end_process(0)
"""


@pytest.mark.slow
def test_a_rank_reads_what_it_holds_and_each_element_has_one_owner(tmp_path):
    """Whole parameters where the compute copies are whole, its ranges under ZeRO-3."""
    (tmp_path / "reads.py").write_text(READS)
    overrides = [*TINY_RUN, "name=x", "corpus.directory=y", "training.total_steps=1"]
    done = run_script(tmp_path / "reads.py", overrides, processes=2)
    assert done.returncode == 0, done.stderr
    model = compose(RunConfig, "train", overrides).model
    total, names = count_parameters(model).total, list(parameter_shapes(model))
    by_stage = {found[0][0]: found for found in map(json.loads, filter(_is_json, done.stdout.splitlines()))}
    assert sorted(by_stage) == [0, 1, 2, 3]
    for stage, ranks in by_stage.items():
        for _, reads, held, _ in ranks:
            if stage == 3:
                assert reads == held
                assert sum(numel for _, _, numel in reads) <= total / 2 + len(names)
            else:
                assert [name for name, _, _ in reads] == names
                assert sum(numel for _, _, numel in reads) == total
        owned = [part for _, _, _, parts in ranks for part in parts]
        ends = {}
        for name, offset, numel in sorted(owned):
            assert offset == ends.get(name, 0)
            ends[name] = offset + numel
        assert sum(ends.values()) == total and ends.keys() == set(names)


def _is_json(line):
    return line.startswith("[[")
