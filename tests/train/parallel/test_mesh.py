"""Coordinates, groups, and sums over the named groups between real processes."""

import itertools

import pytest
import torch

from tests.runs import run_script
from train.parallel.mesh import GROUP_NAMES, Mesh, MeshShape

SHAPES = [MeshShape(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_and_coordinates_are_one_to_one(shape):
    ranks = [
        shape.rank(*place)
        for place in itertools.product(range(shape.pipeline), range(shape.data), range(shape.sequence))
    ]
    # Sequence ranks are neighbours, then replicas, then stages.
    assert ranks == list(range(shape.size))
    for rank in ranks:
        assert shape.rank(*shape.coordinates(rank)) == rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_rank_is_in_one_group_of_each_name(shape):
    for name in GROUP_NAMES:
        assert sorted(itertools.chain(*shape.members(name))) == list(range(shape.size))
    # Which coordinates the ranks of a group share.
    shared = {"world": (), "data_and_sequence": (0,), "sequence": (0, 1), "pipeline": (1, 2)}
    sizes = {
        "world": shape.size,
        "data_and_sequence": shape.data * shape.sequence,
        "sequence": shape.sequence,
        "pipeline": shape.pipeline,
    }
    for name, axes in shared.items():
        for ranks in shape.members(name):
            assert len(ranks) == sizes[name] and ranks == sorted(ranks)
            for axis in axes:
                assert len({shape.coordinates(rank)[axis] for rank in ranks}) == 1


def test_groups_of_two_stages_two_replicas_and_two_slices():
    shape = MeshShape(2, 2, 2)
    assert shape.members("sequence") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shape.members("data_and_sequence") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shape.members("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert shape.coordinates(6) == (1, 1, 0)


def test_the_shape_of_a_number_of_processes():
    assert MeshShape.of_world(6) == MeshShape(1, 6, 1)
    assert MeshShape.of_world(12, pipeline=2, sequence=3) == MeshShape(2, 2, 3)
    with pytest.raises(ValueError, match=r"6 processes do not divide .* 2 pipeline stages x 2 .* a multiple of 4"):
        MeshShape.of_world(6, pipeline=2, sequence=2)


def test_a_mesh_of_one_process_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    mesh = Mesh(MeshShape())
    tensor = torch.arange(3.0)
    for name in GROUP_NAMES:
        assert mesh.size_of(name) == 1
        assert mesh.sum(tensor, group=name) is tensor and tensor.tolist() == [0.0, 1.0, 2.0]
        assert mesh.maximum(tensor, group=name).tolist() == [0.0, 1.0, 2.0]
        assert mesh.gather_objects("x", group=name) == ["x"] and mesh.broadcast_object(5, group=name) == 5
        mesh.barrier(group=name)
    mesh.close()


FOUR_PROCESSES = """
import sys
from datetime import timedelta

import torch

from train.__main__ import end_process
from train.parallel.mesh import GROUP_NAMES, join_mesh

pipeline, sequence = int(sys.argv[1]), int(sys.argv[2])
mesh = join_mesh(timedelta(seconds=900), pipeline, sequence)
for name in GROUP_NAMES:
    (mine,) = [ranks for ranks in mesh.shape.members(name) if mesh.rank in ranks]
    # Powers of two: a sum says who took part.
    found = mesh.sum(torch.tensor([2.0**mesh.rank]), group=name)
    assert found.item() == sum(2**rank for rank in mine), (name, mesh.rank, found)
    assert mesh.maximum(torch.tensor([float(mesh.rank)]), group=name).item() == max(mine), name
    assert mesh.gather_objects({"rank": mesh.rank}, group=name) == [{"rank": rank} for rank in mine], name
    assert mesh.broadcast_object(("from", mesh.rank), group=name) == ("from", mine[0]), name
    assert mesh.size_of(name) == len(mine)
    mesh.barrier(group=name)
assert (mesh.pipeline, mesh.data, mesh.sequence) == mesh.shape.coordinates(mesh.rank)
assert mesh.is_main == (mesh.rank == 0)
mesh.close()
assert not torch.distributed.is_initialized()
# One write: lines of other processes come between the parts of a longer one.
sys.stdout.write(f"rank {mesh.rank} of {mesh.shape}\\n")
end_process(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pipeline, sequence", [(2, 2), (1, 2), (2, 1)])
def test_collectives_between_four_processes(tmp_path, pipeline, sequence):
    script = tmp_path / "four.py"
    script.write_text(FOUR_PROCESSES)
    done = run_script(script, [str(pipeline), str(sequence)], processes=4)
    assert done.returncode == 0, done.stderr
    shape = MeshShape(pipeline, 4 // (pipeline * sequence), sequence)
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of {shape}" for rank in range(4)]
