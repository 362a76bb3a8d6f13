"""Reading a prompt in pieces: their size, what they give, and how much memory they take."""

import subprocess
import sys

import pytest
import torch

from model.generation.prefill import LARGEST_PIECE, piece_tokens, read, read_batch, tokens_at_once
from model.hardware import Hardware
from model.memory import prefill_bytes_per_token
from model.presets import preset
from model.state import named_tensors
from tests.model_tools.small_models import CONFIGS, random_model
from tests.runs import PATIENCE, ROOT, environment

H200 = Hardware("NVIDIA H200", compute_bytes=2)


def test_a_piece_is_as_large_as_its_bytes_allow():
    config = preset("xlstm_7b")
    # The feed-forward layer of the 7B: 2 (2 D + 4 F) bytes, and 4 D for the residual stream.
    assert prefill_bytes_per_token(config, 8192, H200) == 2 * (2 * 4096 + 4 * config.ffn_dim) + 4 * 4096
    for gib, tokens in ((0.001, 256), (0.5, 4352), (1, 8704), (60, LARGEST_PIECE)):
        found = piece_tokens(config, H200, 10**6, gib * 2**30)
        assert found == tokens and found % 256 == 0
        assert found == 256 or found * prefill_bytes_per_token(config, 10**6, H200) <= gib * 2**30


def test_with_attention_a_longer_text_has_smaller_pieces():
    sizes = [piece_tokens(preset("llama_7b"), H200, context, 2**30) for context in (2**10, 2**16, 2**20)]
    assert sizes[0] > sizes[1] > sizes[2] >= 256


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_give_what_the_whole_gives(name):
    model = random_model(CONFIGS[name]).double()
    tokens = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens, return_state=True)
    for piece in (7, 50, 64):
        logits, state = read_batch(model, tokens, None, None, piece)
        torch.testing.assert_close(logits, whole.logits[:, -1], rtol=1e-9, atol=1e-9)
        for (name_, actual), (_, expected) in zip(named_tensors(state), named_tensors(whole.state), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=name_)


def test_what_was_read_is_read_on_from():
    model = random_model(CONFIGS["hybrid"]).double()
    text = list(range(60))
    whole, first = read(model, text), read(model, text[:13])
    second = read(model, text[13:], behind=first, piece=20)
    assert second.tokens == whole.tokens == tuple(text)
    torch.testing.assert_close(second.logits, whole.logits, rtol=1e-9, atol=1e-9)
    # Reading on changes nothing of what it begins with.
    torch.testing.assert_close(read(model, text[13:], behind=first).logits, second.logits, rtol=1e-9, atol=1e-9)


MEASURE = """
import resource, sys
import torch
from model.generation.prefill import read, tokens_at_once
from tests.model_tools.small_models import CONFIGS, random_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = random_model(CONFIGS[sys.argv[1]])
text = [1] * (int(sys.argv[2]) * tokens_at_once(model, 1000))
read(model, text[:256])
before = peak()
read(model, text)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_depend_on_how_long_the_prompt_is():
    def grown(pieces):
        command = [sys.executable, "-c", MEASURE, "mlstm", str(pieces)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    two, eight = grown(2), grown(8)
    # The ids themselves are 8 bytes each.
    ids = 6 * tokens_at_once(random_model(CONFIGS["mlstm"]), 1000) * 16
    assert eight < 1.3 * two + ids
