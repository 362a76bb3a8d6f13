"""Generation against the plain way of running the whole text through the model for every token."""

import pytest
import torch

from model.generation import generate, generating, session
from model.language_model import LanguageModel
from model.state import named_tensors
from tests.model_tools.small_models import CONFIGS, random_model

PROMPT = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(1))


def in_pieces_of(monkeypatch, tokens):
    """Let so many tokens, of all sequences together, be all that memory allows at once."""
    monkeypatch.setattr(generating, "tokens_at_once", lambda _model, _context: tokens)


def greedy_by_whole_texts(model, prompt, count):
    tokens = prompt
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prefill", [8, 512])
def test_greedy_is_the_most_likely_token_of_the_whole_text(monkeypatch, name, prefill):
    in_pieces_of(monkeypatch, 2 * prefill)
    model = random_model(CONFIGS[name])
    expected = greedy_by_whole_texts(model, PROMPT, 10)
    assert len(set(expected.flatten().tolist())) > 5
    assert torch.equal(generate(model, PROMPT, max_new_tokens=10, temperature=0), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_different_lengths_do_not_touch_each_other(monkeypatch, name):
    in_pieces_of(monkeypatch, 4 * 8)
    model = random_model(CONFIGS[name])
    prompts = [PROMPT[0, :3].tolist(), PROMPT[1].tolist(), [5], PROMPT[0, :17].tolist()]
    together = generate(model, prompts, max_new_tokens=6, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = greedy_by_whole_texts(model, torch.tensor([prompt]), 6)
        assert torch.equal(together[row], alone[0])


def test_sampling_follows_the_seed_and_the_row():
    model = random_model(CONFIGS["mlstm"])
    settings = {"max_new_tokens": 30, "temperature": 1.5}
    first = generate(model, PROMPT, seed=7, **settings)
    assert torch.equal(generate(model, PROMPT, seed=7, **settings), first)
    assert not torch.equal(generate(model, PROMPT, seed=8, **settings), first)
    assert torch.equal(generate(model, PROMPT[:1], seed=7, **settings)[0], first[0])
    twice = generate(model, PROMPT[:1].expand(2, -1), seed=7, **settings)
    assert not torch.equal(twice[0], twice[1])


@pytest.mark.parametrize("running_ahead", [("cuda",), ("cpu", "cuda")])
def test_each_sequence_stops_by_itself(monkeypatch, running_ahead):
    # Also where the next step is launched before the last one's tokens are read.
    monkeypatch.setattr(session, "RUNNING_AHEAD", running_ahead)
    model = random_model(CONFIGS["mlstm"])
    free = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    stop = next(token for token in free[0].tolist() if token not in free[1].tolist())
    position = free[0].tolist().index(stop)
    steps = []
    stopped = generate(
        model, PROMPT, max_new_tokens=20, temperature=0, stop_token=stop, on_token=lambda *step: steps.append(step)
    )
    assert torch.equal(stopped[1], free[1])
    assert torch.equal(stopped[0, : position + 1], free[0, : position + 1])
    assert (stopped[0, position:] == stop).all()
    assert torch.equal(torch.stack([tokens for tokens, _ in steps], dim=1), stopped)
    assert [active.tolist() for _, active in steps] == [[step <= position, True] for step in range(20)]
    alone = generate(model, PROMPT[:1], max_new_tokens=20, temperature=0, stop_token=stop)
    assert alone.shape == (1, position + 1)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn():
    model = random_model(CONFIGS["mlstm"])
    free = generate(model, PROMPT, max_new_tokens=60, temperature=2.0)
    assert free.max() >= 20
    assert generate(model, PROMPT, max_new_tokens=60, temperature=2.0, vocab_size=20).max() < 20


@pytest.mark.parametrize("name", ["mlstm", "neurips"])
def test_the_state_is_fp32_and_of_one_size_however_long_the_text(monkeypatch, name):
    in_pieces_of(monkeypatch, 2 * 8)
    model = random_model(CONFIGS[name]).to(torch.bfloat16)
    sizes, lengths, logits = [], [], []
    advance, predict = LanguageModel.advance, LanguageModel.predict

    def measure(state):
        tensors = [tensor for _, tensor in named_tensors(state)]
        assert max(tensors, key=torch.numel).dtype == torch.float32
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        return state

    def measured_advance(self, inputs, **arguments):
        lengths.append(inputs.shape[1])
        return measure(advance(self, inputs, **arguments))

    def measured_predict(self, inputs, **arguments):
        lengths.append(inputs.shape[1])
        behind, state = predict(self, inputs, **arguments)
        logits.append(behind.shape)
        return behind, measure(state)

    monkeypatch.setattr(LanguageModel, "advance", measured_advance)
    monkeypatch.setattr(LanguageModel, "predict", measured_predict)
    generate(model, PROMPT, max_new_tokens=30)
    assert lengths == [8, 8, 7, *[1] * 29]
    assert set(logits) == {(2, 96)}
    # The state that decoding overwrites has copies of the normalisers.
    prefill, decoding = sizes[:3], sizes[3:]
    assert len(set(prefill)) == len(set(decoding)) == 1 and decoding[0] <= 1.05 * prefill[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 .* or positive, not -1.0"),
        ({"top_k": 0}, "top_k must be at least 1 or null, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, not -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"stop_token": 96}, "stop_token 96 is not among the model's ids 0 to 95"),
        ({"prompt_tokens": [[1], []]}, "prompt 1 is empty"),
        ({"prompt_tokens": []}, "holds no prompt"),
        ({"prompt_tokens": [[1, 96]]}, "prompt 0 holds ids 1 to 96, the model has 0 to 95"),
    ],
)
def test_senseless_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": random_model(CONFIGS["mlstm"]), "prompt_tokens": PROMPT, "max_new_tokens": 1, **change})
