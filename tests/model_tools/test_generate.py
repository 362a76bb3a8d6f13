"""Generation against the plain way of running the whole text through the model for every token."""

import pytest
import torch

import model.generation.session as generate_module
from model.generation import generate
from tests.model_tools.small_models import CONFIGS, random_model

PROMPT = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(1))


def greedy_by_whole_texts(model, prompt, count):
    tokens = prompt
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prefill", [8, 512])
def test_greedy_is_the_most_likely_token_of_the_whole_text(monkeypatch, name, prefill):
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", prefill)
    model = random_model(CONFIGS[name])
    expected = greedy_by_whole_texts(model, PROMPT, 10)
    assert len(set(expected.flatten().tolist())) > 5
    assert torch.equal(generate(model, PROMPT, max_new_tokens=10, temperature=0), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_different_lengths_do_not_touch_each_other(monkeypatch, name):
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 8)
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


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "kept"),
    [
        (None, 1.0, 1.0, 4),
        (3, 1.0, 1.0, 3),
        (None, 0.75, 1.0, 2),
        (1, 1.0, 2.0, 1),
        (3, 0.01, 1.0, 1),
        (9, 0.95, 0.5, 3),
    ],
)
def test_choice_has_the_right_candidates_and_probabilities(top_k, top_p, temperature, kept):
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    expected = torch.softmax(probabilities.log() / temperature, dim=0)
    smallest_kept = expected.sort(descending=True).values[kept - 1]
    expected = torch.where(expected >= smallest_kept, expected, 0)
    expected = expected / expected.sum()
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    chosen = generate_module._choose(probabilities.log().expand(10_000, 4), draws, temperature, top_k, top_p)
    shares = torch.bincount(chosen, minlength=4) / 10_000
    assert torch.allclose(shares, expected.float(), atol=2e-4)


def test_extreme_draws_stay_among_the_candidates():
    logits = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]]).expand(2, 4)
    draws = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert generate_module._choose(logits, draws, 1.0, None, 1.0).tolist() == [1, 0]
    assert generate_module._choose(logits, draws, 1.0, 2, 1.0).tolist() == [1, 2]


def test_each_sequence_stops_by_itself():
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
def test_memory_is_constant_and_the_state_is_fp32(monkeypatch, name):
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 8)
    model = random_model(CONFIGS[name]).to(torch.bfloat16)
    sizes, logits = [], []

    def measure(_module, _inputs, output):
        tensors = []
        output.state.map(lambda tensor: tensors.append(tensor) or tensor)
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        assert max(tensors, key=torch.numel).dtype == torch.float32
        logits.append(output.logits.numel())

    model.register_forward_hook(measure)
    generate(model, PROMPT, max_new_tokens=30)
    # The state that decoding overwrites has copies of the normalisers.
    prefill, decoding = sizes[:3], sizes[3:]
    assert len(set(prefill)) == len(set(decoding)) == 1 and decoding[0] <= 1.05 * prefill[0]
    assert max(logits) == 2 * 8 * 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 .* or positive, not -1.0"),
        ({"top_k": 0}, "top_k must be at least 1 or null, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"stop_token": 96}, "stop_token 96 is not among the model's ids 0 to 95"),
        ({"prompt_tokens": [[1], []]}, "prompt 1 is empty"),
        ({"prompt_tokens": []}, "holds no prompt"),
        ({"prompt_tokens": [[1, 96]]}, "prompt 0 holds ids 1 to 96, the model has 0 to 95"),
    ],
)
def test_senseless_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": random_model(CONFIGS["mlstm"]), "prompt_tokens": PROMPT, "max_new_tokens": 1, **change})
