"""Weights directories: whole and fragmented parameters, and every way in which a directory can be wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.config import AttentionConfig, MLSTMConfig, ModelConfig, SLSTMConfig
from model.loading import open_stored
from model.weights import (
    WeightsError,
    WeightsReader,
    load_weights,
    read_model_json,
    save_fragments,
    save_model,
    write_model_json,
)

CONFIG = ModelConfig(
    d_model=64, n_blocks=4, slstm_at=[1], attention_at=[2], mlstm=MLSTMConfig(n_heads=2), slstm=SLSTMConfig(),
    attention=AttentionConfig(n_heads=2, n_kv_heads=1), logit_soft_cap=None,
)  # fmt: skip


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.bias": torch.randn(7, generator=generator),
        "scale": torch.randn((), generator=generator),
    }


def write_sharded(directory, boundaries, values=None):
    """Write the parameters as ZeRO does: one flat buffer cut at `boundaries`, one file for each part."""
    values = values or tensors()
    shapes = {name: tensor.shape for name, tensor in values.items()}
    flat = torch.cat([tensor.reshape(-1) for tensor in values.values()])
    cuts = [0, *boundaries, flat.numel()]
    for rank, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        partition, fragments, begin = flat[start:end], [], 0
        for name, tensor in values.items():
            low, high = max(begin, start), min(begin + tensor.numel(), end)
            if low < high:
                fragments.append((name, low - begin, partition[low - start : high - start]))
            begin += tensor.numel()
        save_fragments(directory / f"weights-{rank:05d}.safetensors", fragments, shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundaries", [[], [4], [15], [2, 4, 9, 20, 22]])
def test_parameters_come_back_bitwise_from_any_cut(tmp_path, boundaries, dtype):
    values = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    write_sharded(tmp_path, boundaries, values)
    loaded = dict(load_weights(tmp_path))
    assert list(loaded) == list(values)
    for name, tensor in values.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_more_files_than_are_held_open(tmp_path):
    values = {"w": torch.arange(300.0)}
    write_sharded(tmp_path, list(range(1, 300)), values)
    assert torch.equal(dict(load_weights(tmp_path))["w"], values["w"])


def test_a_lost_file_is_named_by_the_parameter_it_held(tmp_path):
    write_sharded(tmp_path, [4, 10])
    (tmp_path / "weights-00001.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"a\.weight elements 4 to 9 are missing"):
        load_weights(tmp_path)


def test_a_lost_last_file_is_noticed(tmp_path):
    write_sharded(tmp_path, [15])
    (tmp_path / "weights-00001.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"b\.bias elements 0 to 6 are missing"):
        load_weights(tmp_path)


def test_files_of_two_saves_overlap(tmp_path):
    write_sharded(tmp_path, [4, 10])
    write_sharded(tmp_path, [8])
    with pytest.raises(WeightsError, match="in more than one file"):
        load_weights(tmp_path)


def test_fragments_beyond_the_parameter_are_refused(tmp_path):
    save_fragments(tmp_path / "weights-0.safetensors", [("w", 0, torch.zeros(5))], {"w": (4,)})
    with pytest.raises(WeightsError, match="w has 4 elements but fragments reach 5"):
        load_weights(tmp_path)


def test_disagreeing_shapes_dtypes_and_versions_are_refused(tmp_path):
    one, two = tmp_path / "weights-0.safetensors", tmp_path / "weights-1.safetensors"
    save_fragments(one, [("w", 0, torch.zeros(4))], {"w": (2, 4)})
    save_fragments(two, [("w", 4, torch.zeros(4))], {"w": (4, 2)})
    with pytest.raises(WeightsError, match="in another file"):
        load_weights(tmp_path)
    save_fragments(two, [("w", 4, torch.zeros(4, dtype=torch.bfloat16))], {"w": (2, 4)})
    with pytest.raises(WeightsError, match="different dtypes"):
        dict(load_weights(tmp_path))
    save_file({"w@0": torch.zeros(4)}, two, metadata={"format_version": "9", "shapes": "{}"})
    with pytest.raises(WeightsError, match="format_version 9; this version of xlstm-pretrain reads 1"):
        load_weights(tmp_path)


def test_damaged_or_absent_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="holds no weights-"):
        load_weights(tmp_path)
    write_sharded(tmp_path, [4])
    path = tmp_path / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"weights-00001\.safetensors cannot be read"):
        load_weights(tmp_path)


def test_model_json_round_trip(tmp_path):
    write_model_json(tmp_path / "new", CONFIG)
    assert read_model_json(tmp_path / "new") == CONFIG


def test_model_json_errors(tmp_path):
    with pytest.raises(WeightsError, match=r"model\.json does not exist"):
        read_model_json(tmp_path)
    path = write_model_json(tmp_path, CONFIG)
    document = json.loads(path.read_text())
    document["model"]["mlstm"]["heads"] = 3
    path.write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=r"unknown keys model\.mlstm\.heads"):
        read_model_json(tmp_path)
    path.write_text(json.dumps({"format_version": 7, "model": {}}))
    with pytest.raises(WeightsError, match="format_version 7"):
        read_model_json(tmp_path)
    path.write_text('{"format_version"')
    with pytest.raises(WeightsError, match="not valid JSON"):
        read_model_json(tmp_path)
    path.write_text('{"vocab_size": 3}')
    with pytest.raises(WeightsError, match="not written by xlstm-pretrain"):
        read_model_json(tmp_path)


def test_tied_parameters_are_written_once(tmp_path):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    save_model(tied, CONFIG, tmp_path)
    assert read_model_json(tmp_path) == CONFIG
    assert [name for name, _ in load_weights(tmp_path)] == ["0.weight", "0.bias", "1.bias"]


def test_weights_of_another_model_than_their_model_json_are_refused(tmp_path):
    save_model(nn.Linear(4, 3), CONFIG, tmp_path)
    with pytest.raises(WeightsError, match=r"the weights are not those of its model\.json: \d+ parameters .*\(bias, "):
        open_stored(tmp_path)


@pytest.mark.parametrize(("offset", "numel"), [(0, 15), (3, 1), (2, 9), (14, 1)])
def test_ranges_of_a_parameter_across_files(tmp_path, offset, numel):
    write_sharded(tmp_path, [2, 4, 9, 20])
    read = WeightsReader(tmp_path).read_range("a.weight", offset, numel)
    assert torch.equal(read, tensors()["a.weight"].flatten()[offset : offset + numel])
