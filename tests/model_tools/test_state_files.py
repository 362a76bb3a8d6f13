"""What a model has read, written to a file and read again, whole or damaged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.generation import ContinuousBatch, SamplingSettings, read, state_files
from model.generation.state_files import StateFileError, fingerprint, load_prefix, save_prefix
from model.state import named_tensors
from tests.model_tools.small_models import CONFIGS, random_model

TEXT = [(7 * number) % 96 for number in range(50)]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIGS["hybrid"])


@pytest.fixture
def file(model, tmp_path):
    save_prefix(tmp_path / "read.safetensors", read(model, TEXT[:20]), model)
    return tmp_path / "read.safetensors"


def continued(model, prompt, behind=None):
    batch = ContinuousBatch(model, 1, prefill_tokens=16)
    batch.add(prompt, SamplingSettings(8, temperature=0, repetition_penalty=1.2, logprobs=0), behind=behind)
    tokens = []
    while batch.waiting or batch.running:
        tokens += batch.step()
    return [(token.token, token.logprob) for token in tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_comes_back_bit_for_bit_and_is_continued_alike(name, dtype, tmp_path):
    model = random_model(CONFIGS[name]).to(dtype)
    prefix = read(model, TEXT[:20])
    save_prefix(tmp_path / "a", prefix, model)
    loaded = load_prefix(tmp_path / "a", model)
    assert loaded.tokens == tuple(TEXT[:20]) and torch.equal(loaded.logits, prefix.logits)
    for (_, old), (_, new) in zip(named_tensors(prefix.state), named_tensors(loaded.state), strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype
    assert continued(model, TEXT[20:], loaded) == continued(model, TEXT[20:], prefix)
    assert continued(model, [], loaded) == continued(model, [], prefix)


def test_the_file_of_a_recurrent_model_has_one_size(tmp_path):
    model = random_model(CONFIGS["neurips"])
    for count in (4, 40):
        save_prefix(tmp_path / str(count), read(model, TEXT[:count]), model)
    sizes = [(tmp_path / str(count)).stat().st_size for count in (4, 40)]
    assert abs(sizes[1] - sizes[0] - 36 * 8) < 64


def test_the_fingerprint_tells_weights_dtypes_and_settings_apart(model):
    others = [
        random_model(CONFIGS["hybrid"], seed=1),
        random_model(CONFIGS["mlstm"]),
        random_model(CONFIGS["hybrid"]).to(torch.bfloat16),
    ]
    changed = random_model(CONFIGS["hybrid"])
    with torch.no_grad():
        changed.blocks[3].ffn_norm.weight[5] = torch.nextafter(changed.blocks[3].ffn_norm.weight[5], torch.tensor(9.0))
    found = {fingerprint(each) for each in [model, changed, *others]}
    assert len(found) == 5
    assert fingerprint(random_model(CONFIGS["hybrid"])) == fingerprint(model)


def rewritten(file, change_tensors=lambda tensors: None, **metadata):
    """The file as somebody else may write it, with a checksum that is right."""
    with safe_open(file, framework="pt") as opened:
        kept = dict(opened.metadata())
    tensors = load_file(file)
    change_tensors(tensors)
    kept.update({"sha256": state_files._sha256(tensors), **metadata})
    save_file(tensors, file, metadata={key: value for key, value in kept.items() if value is not None})


def test_a_state_of_another_model_is_refused(file, model):
    other = random_model(CONFIGS["hybrid"], seed=1)
    with pytest.raises(StateFileError, match=r"read.safetensors is the state of another model, or of these weights in"):
        load_prefix(file, other)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(file, model, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(StateFileError, match=r"read.safetensors cannot be read \(damaged or cut short\)"):
        load_prefix(file, model)


def test_any_changed_byte_of_the_tensors_is_noticed(file, model):
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for position in (begin, (begin + len(content)) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(StateFileError, match="is damaged: its tensors are not those that were written"):
            load_prefix(file, model)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop("blocks.2.keys"), {}, "blocks.2.keys is not what this model has behind 20 tokens"),
        (lambda t: t.update(strange=torch.zeros(1)), {}, "strange is not what this model has behind 20 tokens"),
        (lambda t: t.update(logits=torch.zeros(1, 95)), {}, "logits is not what this model has"),
        (lambda t: t.update(tokens=t["tokens"] + 90), {}, "its tokens are not among the model's ids 0 to 95"),
        (lambda t: None, {"tokens": "21"}, "is not what this model has behind 21 tokens"),
        (lambda t: None, {"tokens": "many"}, r"do not tell how many tokens the model has read \('many'\)"),
        (lambda t: None, {"kind": None}, "holds no state of a model"),
        (lambda t: None, {"format_version": "2"}, "format_version 2; .* upgrade xlstm-pretrain"),
        (lambda t: None, {"sha256": None}, "is damaged"),
    ],
)
def test_what_somebody_else_wrote_is_refused(file, model, change, metadata, message):
    rewritten(file, change, **metadata)
    with pytest.raises(StateFileError, match=message):
        load_prefix(file, model)


def test_files_that_are_none_or_no_state_are_refused(model, tmp_path):
    with pytest.raises(StateFileError, match="absent does not exist"):
        load_prefix(tmp_path / "absent", model)
    with pytest.raises(StateFileError, match="it is no regular file"):
        load_prefix(tmp_path, model)
    (tmp_path / "text").write_text("some text")
    with pytest.raises(StateFileError, match="text cannot be read"):
        load_prefix(tmp_path / "text", model)
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(StateFileError, match="weights holds no state of a model"):
        load_prefix(tmp_path / "weights", model)


def test_the_header_says_what_the_file_is(file, model):
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert {key: header[key] for key in ("format_version", "kind", "tokens")} == {
        "format_version": "1",
        "kind": "what a model has read",
        "tokens": "20",
    }
    assert header["model"] == fingerprint(model)
