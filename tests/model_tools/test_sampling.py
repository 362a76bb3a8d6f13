"""Choosing tokens, against the same rules written out in plain Python."""

import math

import pytest
import torch

from model.generation.sampling import Limits, Sampler, SamplingSettings, choose, penalised, stream_of, uniform


def choose_plainly(scores, draw, temperature, top_k, top_p, min_p):
    """The specification of `choose` for one row, token by token."""
    ranked = sorted(enumerate(scores), key=lambda item: -item[1])[:top_k]
    weights = [math.exp((score - ranked[0][1]) / temperature) for _, score in ranked]
    probabilities = [weight / sum(weights) for weight in weights]
    kept, before = [], 0.0
    for (token, _), probability in zip(ranked, probabilities, strict=True):
        if not kept or (before < top_p and probability >= min_p * probabilities[0]):
            kept.append((token, probability))
        before += probability
    passed, target = 0.0, draw * sum(probability for _, probability in kept)
    for token, probability in kept:
        passed += probability
        if passed >= target:
            return token
    return kept[-1][0]


def chosen(scores, draws, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    rows = scores.shape[0]

    def of_rows(value):
        return torch.full((rows,), value, dtype=torch.float64)

    k = torch.full((rows,), top_k or scores.shape[1])
    return choose(scores, draws, Limits(of_rows(temperature), k, of_rows(top_p), of_rows(min_p)))


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "temperature", "kept"),
    [
        (None, 1.0, 0.0, 1.0, 4),
        (3, 1.0, 0.0, 1.0, 3),
        (None, 0.75, 0.0, 1.0, 2),
        (1, 1.0, 0.0, 2.0, 1),
        (3, 0.01, 0.0, 1.0, 1),
        (9, 0.95, 0.0, 0.5, 3),
        (None, 1.0, 0.4, 1.0, 2),
        (None, 1.0, 1.0, 1.0, 1),
        (None, 0.8, 0.25, 1.0, 3),
    ],
)
def test_choice_has_the_right_candidates_and_probabilities(top_k, top_p, min_p, temperature, kept):
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    expected = torch.softmax(probabilities.log() / temperature, dim=0)
    smallest_kept = expected.sort(descending=True).values[kept - 1]
    expected = torch.where(expected >= smallest_kept, expected, 0)
    expected = expected / expected.sum()
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens = chosen(probabilities.log().expand(10_000, 4), draws, temperature, top_k, top_p, min_p)
    shares = torch.bincount(tokens, minlength=4) / 10_000
    assert torch.allclose(shares, expected.float(), atol=2e-4)


def test_choice_is_what_the_rules_say_row_by_row():
    generator = torch.Generator().manual_seed(3)
    scores = 3 * torch.randn(200, 30, generator=generator)
    draws = torch.rand(200, generator=generator, dtype=torch.float64)
    temperature = 0.2 + 2 * torch.rand(200, generator=generator, dtype=torch.float64)
    top_k = torch.randint(1, 31, (200,), generator=generator)
    top_p = 0.05 + 0.95 * torch.rand(200, generator=generator, dtype=torch.float64)
    min_p = 0.3 * torch.rand(200, generator=generator, dtype=torch.float64)
    tokens = choose(scores, draws, Limits(temperature, top_k, top_p, min_p))
    rows = zip(*(values.tolist() for values in (scores, draws, temperature, top_k, top_p, min_p)), strict=True)
    assert tokens.tolist() == [choose_plainly(*row) for row in rows]
    assert len(set(tokens.tolist())) > 10


def test_extreme_draws_stay_among_the_candidates():
    logits = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]]).expand(2, 4)
    draws = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert chosen(logits, draws).tolist() == [1, 0]
    assert chosen(logits, draws, top_k=2).tolist() == [1, 2]


def splitmix64(state):
    """The generator of Java's SplittableRandom in whole numbers of Python."""
    state %= 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_random_numbers_are_those_of_splitmix64():
    seeds, positions = [0, 1, -1, 2**64 - 2, 3 * 2**64 + 7], [0, 1, 2, 10**6, 2**40]
    actual = uniform(torch.tensor([stream_of(seed) for seed in seeds]), torch.tensor(positions))
    for number, seed, position in zip(actual.tolist(), seeds, positions, strict=True):
        expected = splitmix64(splitmix64(seed) + (position + 1) * 0x9E3779B97F4A7C15)
        assert number == (expected >> 11) / 2**53
    # The generator itself: what java.util.SplittableRandom(0).nextLong() gives first.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_random_numbers_are_even_and_those_of_near_seeds_have_nothing_in_common():
    positions = torch.arange(50_000)
    streams = [uniform(torch.full_like(positions, stream_of(seed)), positions) for seed in (0, 1, 2)]
    for stream in streams:
        counts = torch.histc(stream.float(), 10, 0, 1)
        assert (counts - 5000).abs().max() < 5 * 5000**0.5
        assert torch.corrcoef(torch.stack([stream[1:], stream[:-1]]))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs().max() < 0.02


def test_repetition_makes_logits_smaller_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False], [False, True, False]])
    actual = penalised(logits, seen, torch.tensor([2.0, 1.5]))
    assert actual.tolist() == [[1.0, -4.0, 1.0], [2.0, -3.0, 1.0]]


def test_a_row_remembers_its_prompt_and_what_it_drew():
    sampler = Sampler(2, 4, torch.device("cpu"))
    sampler.begin(0, SamplingSettings(9, temperature=0, repetition_penalty=100.0), [3, 7])
    sampler.begin(1, SamplingSettings(9, temperature=0), [3])
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).expand(2, 5)
    assert [sampler.draw(logits).tokens.tolist() for _ in range(4)] == [[2, 3], [1, 3], [0, 3], [3, 3]]
    # Another sequence in the row begins anew.
    sampler.begin(0, SamplingSettings(9, temperature=0, repetition_penalty=100.0), [])
    assert sampler.draw(logits).tokens.tolist() == [3, 3]


def test_a_row_draws_alike_beside_any_others_and_wherever_it_moves():
    logits = torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(5))
    mine = SamplingSettings(99, temperature=1.3, top_p=0.9, seed=11)
    alone = Sampler(1, 50, torch.device("cpu"))
    alone.begin(0, mine, [])
    expected = [alone.draw(step[:1]).tokens.item() for step in logits]
    beside = Sampler(3, 50, torch.device("cpu"))
    beside.begin(0, SamplingSettings(99, temperature=0, repetition_penalty=1.5), [1, 2])
    beside.begin(2, mine, [])
    actual = []
    for number, step in enumerate(logits):
        if number == 10:
            beside.begin(1, SamplingSettings(99, temperature=5.0, top_k=3, seed=11), [])
        row = 2 if number < 20 else 1
        if number == 20:
            beside.move(2, 1)
        actual.append(beside.draw(step[:1].expand(3, -1)).tokens[row].item())
    assert actual == expected and len(set(actual)) > 15


def test_log_probabilities_are_the_models_own():
    sampler = Sampler(2, 4, torch.device("cpu"))
    sampler.begin(0, SamplingSettings(9, temperature=0, repetition_penalty=9.0, logprobs=2), [3])
    sampler.begin(1, SamplingSettings(9, temperature=0), [])
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0]]).log().expand(2, 5)
    drawn = sampler.draw(logits)
    assert drawn.tokens.tolist() == [2, 3]
    assert torch.allclose(drawn.logprobs.exp(), torch.tensor([0.3, 0.4]))
    assert drawn.top_tokens[0].tolist() == [3, 2]
    assert torch.allclose(drawn.top_logprobs[0].exp(), torch.tensor([0.4, 0.3]))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 (most likely token) or positive, not -1.0"),
        ({"temperature": math.nan}, "temperature must be 0 (most likely token) or positive, not nan"),
        ({"top_k": 0}, "top_k must be at least 1 or null, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive (1: none), not 0.0"),
        ({"logprobs": -1}, "logprobs must be at least 0 or null, not -1"),
        ({"logprobs": 97}, "logprobs must be at most the 96 ids that there are, not 97"),
        ({"stop_tokens": (1, 96)}, "stop_tokens [96] are not among the model's ids 0 to 95"),
    ],
)
def test_senseless_settings_have_a_line_each(setting, problem):
    assert SamplingSettings(**{"max_new_tokens": 1, **setting}).problems(96) == [problem]


def test_all_problems_are_told_at_once():
    assert len(SamplingSettings(0, temperature=-1, top_k=0, top_p=0).problems()) == 4
