"""Weights that ranks have cut up, written as whole tensors: under the parameters' names, in one file or several."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

import model.loading
from model.consolidation import consolidate
from model.loading import load, open_stored
from model.weights import WeightsError, WeightsReader, save_fragments, save_model, write_model_json
from model.whole_tensors import into_shards, write_whole_tensors
from tests.model_tools.small_models import CONFIGS, random_model


def save_in_parts(model, config, folder, files):
    """As `files` ranks would, each with a part of every parameter that begins anywhere."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    write_model_json(folder, config)
    for rank in range(files):
        fragments = []
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1)
            begin, end = (flat.numel() * number // files for number in (rank, rank + 1))
            fragments.append((name, begin, flat[begin:end]))
        save_fragments(folder / f"weights-{rank:05d}.safetensors", fragments, shapes)


def assert_equal(found, expected, dtype=torch.float32):
    expected = dict(expected)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], parameter.detach().to(dtype)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_one_file_holds_every_parameter_under_its_name_and_loads_again(name, tmp_path):
    model = random_model(CONFIGS[name])
    save_in_parts(model, CONFIGS[name], tmp_path / "parts", 3)
    assert consolidate(open_stored(tmp_path / "parts"), tmp_path / "whole") == ["model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["model.json", "model.safetensors"]
    # By the library itself.
    assert_equal(load_file(tmp_path / "whole" / "model.safetensors"), model.named_parameters())
    assert_equal(dict(load(tmp_path / "whole").named_parameters()), model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_files_have_an_index_and_are_no_larger_than_asked_for(dtype, tmp_path):
    config = CONFIGS["hybrid"]
    model = random_model(config)
    save_in_parts(model, config, tmp_path / "parts", 2)
    limit = 200_000
    files = consolidate(open_stored(tmp_path / "parts"), tmp_path / "whole", dtype, limit)
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        tensors = load_file(tmp_path / "whole" / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert_equal(found, model.named_parameters(), dtype)
    reader = WeightsReader(tmp_path / "whole")
    assert reader.dtypes == {"BF16" if dtype == torch.bfloat16 else "F32"}
    # Any range, also within rows.
    name = next(name for name, tensor in found.items() if tensor.dim() == 2)
    flat = found[name].reshape(-1)
    for offset, numel in ((0, 1), (1, 130), (127, 2), (flat.numel() - 3, 3), (0, flat.numel())):
        assert torch.equal(reader.read_range(name, offset, numel), flat[offset : offset + numel])


def test_one_parameter_is_in_memory_at_a_time(tmp_path):
    shapes = {f"p{number}": (100, 7) for number in range(20)} | {"scalar": ()}
    alive, seen = weakref.WeakSet(), []

    def read(name):
        # The one that was asked for before may not be let go of yet.
        assert len(alive) <= 1, f"{len(alive)} tensors are held when {name} is read"
        tensor = torch.full(shapes[name], float(len(seen)))
        alive.add(tensor)
        seen.append(name)
        return tensor

    (path,) = write_whole_tensors(tmp_path, shapes, read, torch.float32, {"format": "pt"}, None)
    assert seen == list(shapes)
    found = load_file(path)
    assert all(torch.equal(found[name], torch.full(shapes[name], float(number))) for number, name in enumerate(shapes))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, [["a", "b", "c", "d"]]), (5, [["a", "b"], ["c"], ["d"]]), (1, [["a"], ["b"], ["c"], ["d"]])],
)
def test_files_are_cut_between_tensors(limit, expected):
    assert into_shards({"a": 2, "b": 3, "c": 9, "d": 1}, limit) == expected


def test_a_lost_or_foreign_file_is_named(tmp_path):
    config = CONFIGS["mlstm"]
    save_model(random_model(config), config, tmp_path / "parts")
    files = consolidate(open_stored(tmp_path / "parts"), tmp_path / "whole", max_bytes=300_000)
    lost = tmp_path / "whole" / files[1]
    moved = lost.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"are missing: a \*\.safetensors file was lost"):
        open_stored(tmp_path / "whole")
    moved.rename(lost)
    write_whole_tensors(tmp_path, {"head": (2, 3)}, lambda name: torch.zeros(2, 3), torch.float32, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "whole" / "model-x.safetensors")
    with pytest.raises(WeightsError, match="model-x.safetensors has format_version None"):
        open_stored(tmp_path / "whole")


def test_a_whole_tensor_of_another_shape_is_refused(tmp_path):
    config = CONFIGS["mlstm"]
    write_model_json(tmp_path, config)
    shapes = model.loading.parameter_shapes(config)
    name = max(shapes, key=lambda name: len(shapes[name]))
    metadata = {"format_version": "1", "shapes": json.dumps({name: list(shapes[name])})}
    write_whole_tensors(tmp_path, {name: (3, 1)}, lambda name: torch.zeros(3, 1), torch.float32, metadata)
    with pytest.raises(WeightsError) as error:
        open_stored(tmp_path)
    assert f"{name} is of type F32 and shape [3, 1], no parameter of shape {list(shapes[name])}" in str(error.value)
