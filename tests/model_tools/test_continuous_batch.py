"""Sequences that join and leave a running batch, each against what it is continued with alone."""

import dataclasses
import itertools
import random

import pytest
import torch

from model.config import AttentionConfig
from model.generation import ContinuousBatch, SamplingSettings, generate, read
from model.generation import session as session_module
from tests.model_tools.small_models import CONFIGS, random_model

VOCABULARY = 96
_NO_POSITIONS = AttentionConfig(n_heads=4, n_kv_heads=2, positions="none", sinks=True)
MODELS = {**CONFIGS, "no_positions": dataclasses.replace(CONFIGS["hybrid"], attention=_NO_POSITIONS)}


def prompts(count, seed=0, longest=60):
    chooser = random.Random(seed)
    return [[chooser.randrange(VOCABULARY) for _ in range(chooser.randint(1, longest))] for _ in range(count)]


def alone(model, prompt, settings):
    """What the sequence is continued with when nothing else runs."""
    batch = ContinuousBatch(model, 1, prefill_tokens=16)
    batch.add(prompt, settings)
    return [token.token for token in run(batch)]


def run(batch):
    told = []
    while batch.waiting or batch.running:
        told += batch.step()
    assert batch.step() == []
    return told


@pytest.fixture
def order(request, monkeypatch):
    """ "ahead" is the order of a GPU: the next step is launched before the last one's tokens are read."""
    if request.param == "ahead":
        monkeypatch.setattr(session_module, "RUNNING_AHEAD", ("cpu", "cuda"))


@pytest.mark.parametrize("name", MODELS)
def test_256_greedy_tokens_are_those_of_the_uncached_forward_pass(name):
    model = random_model(MODELS[name])
    given = prompts(3, seed=4, longest=90)
    batch = ContinuousBatch(model, 2, prefill_tokens=32)
    handles = [batch.add(prompt, SamplingSettings(256, temperature=0)) for prompt in given]
    continued = {handle: [] for handle in handles}
    for token in run(batch):
        continued[token.request].append(token.token)
    for prompt, handle in zip(given, handles, strict=True):
        new = continued[handle]
        with torch.no_grad():
            # Each token is the most likely one behind those before it: by induction, all are the same.
            expected = model(torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :].argmax(-1)
        assert new == expected.tolist() and len(new) == 256
    assert len({token for new in continued.values() for token in new}) > 5


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "in_step") for name in MODELS), ("hybrid", "ahead")], indirect=["order"]
)
def test_joining_leaving_and_cancelling_at_random_change_nothing(name, order):
    model, chooser = random_model(MODELS[name]), random.Random(7)
    asked = []
    for prompt in prompts(11, seed=1, longest=40):
        temperature = chooser.choice([0, 0, 1.2])
        penalty = chooser.choice([1.0, 1.3])
        settings = SamplingSettings(
            chooser.randint(1, 18), temperature, top_p=0.9, repetition_penalty=penalty, seed=chooser.randrange(9)
        )
        asked.append((prompt, settings))
    batch = ContinuousBatch(model, 4, prefill_tokens=16, prefix_cache_bytes=2**20)
    left, told, cancelled, seen = list(asked), {}, set(), set()
    of_handle = {}
    while left or batch.waiting or batch.running:
        if left and chooser.random() < 0.5:
            request = left.pop()
            of_handle[batch.add(*request)] = request
        if of_handle and chooser.random() < 0.1:
            handle = chooser.choice(list(of_handle))
            batch.cancel(handle)
            cancelled.add(handle)
        for token in batch.step():
            assert token.request not in seen
            told.setdefault(token.request, []).append(token.token)
            if token.finish_reason is not None:
                assert token.finish_reason == "length"
                seen.add(token.request)
        assert batch.running + batch.free_slots == 4
    assert set(of_handle) == seen | cancelled and cancelled - seen and len(seen) > 6
    for handle, (prompt, settings) in of_handle.items():
        expected = alone(model, prompt, settings)
        actual = told.get(handle, [])
        assert actual == (expected if handle in seen else expected[: len(actual)])


def test_with_one_batch_size_not_even_rounding_depends_on_the_others():
    model = random_model(CONFIGS["hybrid"])
    settings = SamplingSettings(20, temperature=0, logprobs=1)
    mine, *others = prompts(5, seed=2)

    def logprobs(beside):
        batch = ContinuousBatch(model, 4, prefill_tokens=16, batch_sizes=[4])
        handle = batch.add(mine, settings)
        for prompt in beside:
            batch.add(prompt, SamplingSettings(7, temperature=1.0))
        return [token.logprob for token in run(batch) if token.request == handle]

    assert len(expected := logprobs([])) == 20
    assert logprobs(others) == expected


@pytest.mark.parametrize("order", ["in_step", "ahead"], indirect=True)
def test_stop_tokens_end_a_sequence_and_free_its_slot(order):
    model = random_model(CONFIGS["mlstm"])
    prompt = prompts(1, seed=3)[0]
    free = alone(model, prompt, SamplingSettings(20, temperature=0))
    stop = free[6]
    batch = ContinuousBatch(model, 1, prefill_tokens=16)
    batch.add(prompt, SamplingSettings(20, temperature=0, stop_tokens=(stop,)))
    second = batch.add([5], SamplingSettings(1, temperature=0))
    told = run(batch)
    assert [token.token for token in told if token.request != second] == free[: free.index(stop) + 1]
    assert [token.finish_reason for token in told if token.finish_reason] == ["stop", "length"]
    assert batch.free_slots == 1


def test_long_prompts_let_the_others_go_on_between_their_pieces():
    model = random_model(CONFIGS["mlstm"])
    batch = ContinuousBatch(model, 3, prefill_tokens=16)
    first = batch.add([1, 2], SamplingSettings(50, temperature=0))
    assert [token.request for token in batch.step()] == [first]
    long = batch.add(prompts(1, longest=1)[0] * 100, SamplingSettings(2, temperature=0))
    short = batch.add([3], SamplingSettings(2, temperature=0))
    for _ in range(6):
        # Six pieces of sixteen tokens, and one of four behind which the short prompt fits too.
        assert [token.request for token in batch.step()] == [first]
        assert batch.waiting == 2
    assert [token.request for token in batch.step()] == [first, long, short]
    assert batch.waiting == 0 and batch.running == 3


def test_tokens_come_with_the_log_probabilities_that_were_asked_for():
    model = random_model(CONFIGS["mlstm"])
    batch = ContinuousBatch(model, 3, prefill_tokens=16, vocab_size=90)
    prompt = [4, 8, 15]
    some = batch.add(prompt, SamplingSettings(3, temperature=0, logprobs=2))
    none = batch.add(prompt, SamplingSettings(3, temperature=0))
    own = batch.add(prompt, SamplingSettings(3, temperature=0, logprobs=0))
    told = batch.step()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1, :90].log_softmax(-1).topk(2)
    by_request = {token.request: token for token in told}
    assert by_request[none].logprob is None and by_request[none].top_logprobs == ()
    assert by_request[own].logprob == by_request[some].logprob and by_request[own].top_logprobs == ()
    ids, values = zip(*by_request[some].top_logprobs, strict=True)
    assert list(ids) == expected.indices.tolist() and by_request[some].token == ids[0]
    assert values == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["mlstm", "hybrid", "neurips"])
def test_prompts_that_begin_alike_are_read_once_and_continued_bit_for_bit(name):
    model = random_model(CONFIGS[name])
    common = prompts(1, seed=8, longest=1)[0] * 70
    asked = [common + [tail] for tail in range(6)] + [common[:64], common[:65]]
    settings = SamplingSettings(8, temperature=0, logprobs=0)

    def told(cache):
        batch = ContinuousBatch(model, 1, prefill_tokens=32, prefix_cache_bytes=cache, batch_sizes=[1])
        for prompt in asked:
            batch.add(prompt, settings)
        return [(token.token, token.logprob) for token in run(batch)], batch.prefix_cache

    plain, unused = told(0)
    cached, cache = told(2**22)
    assert cached == plain
    assert (unused.hits, cache.hits, cache.lookups, cache.tokens_saved) == (0, 7, 8, 6 * 64 + 32)
    # With memory for one state, the longest beginning drives out the shorter one.
    again, small = told(cache.nbytes // 2)
    assert again == plain and small.nbytes <= small.capacity
    assert 0 < small.tokens_saved < cache.tokens_saved


def test_a_sequence_may_begin_behind_what_was_read_before():
    model = random_model(CONFIGS["hybrid"])
    text = prompts(1, seed=9, longest=1)[0] * 30 + [1, 2, 3]
    settings = SamplingSettings(12, temperature=0, repetition_penalty=1.2)
    expected = alone(model, text, settings)
    read_before = read(model, text[:20])
    batch = ContinuousBatch(model, 2, prefill_tokens=16)
    for _ in range(2):
        batch.add(text[20:], settings, behind=read_before)
    batch.add([], settings, behind=read(model, text[20:], behind=read_before))
    told = run(batch)
    for handle in range(3):
        assert [token.token for token in told if token.request == handle] == expected


@pytest.mark.parametrize("order", ["in_step", "ahead"], indirect=True)
def test_a_greedy_batch_gives_what_generate_gives(order):
    model, given = random_model(CONFIGS["hybrid"]), prompts(5, seed=6)
    expected = generate(model, given, max_new_tokens=10, temperature=0)
    batch = ContinuousBatch(model, 3, prefill_tokens=16)
    handles = [batch.add(prompt, SamplingSettings(10, temperature=0)) for prompt in given]
    told = run(batch)
    for row, handle in enumerate(handles):
        assert [token.token for token in told if token.request == handle] == expected[row].tolist()


@pytest.mark.parametrize("name", ["mlstm", "hybrid", "neurips"])
def test_a_slot_takes_the_memory_that_it_says(name):
    model = random_model(CONFIGS[name])
    batches = [ContinuousBatch(model, slots, prefill_tokens=16) for slots in (2, 6)]
    small, large = (batch._session.rows_of_state(batch._session.rows) for batch in batches)
    sizes = []
    for state in (small, large):
        total = []
        state.map(lambda tensor, total=total: total.append(tensor.nbytes) or tensor)
        sizes.append(sum(total))
    assert sizes[1] - sizes[0] == 4 * batches[0].state_bytes_per_slot


def test_caches_of_attention_grow_with_the_longest_sequence_and_shrink_again():
    model = random_model(CONFIGS["attention"])
    batch = ContinuousBatch(model, 2, prefill_tokens=512)
    least = batch.state_bytes_per_slot
    batch.add([1] * 1000, SamplingSettings(40, temperature=0))
    batch.add([2] * 3, SamplingSettings(60, temperature=0))
    told, sizes = [], []
    while batch.waiting or batch.running:
        told += batch.step()
        sizes.append(batch.state_bytes_per_slot)
    # Nothing has joined; then there is room for 1,024 tokens, for 2,048, and again for as few as there can be.
    assert [round(size / least) for size, _ in itertools.groupby(sizes)] == [1, 8, 16, 1]
    short = [token.token for token in told if token.request == 1]
    assert short == alone(model, [2] * 3, SamplingSettings(60, temperature=0))


def test_senseless_requests_are_refused_with_all_problems():
    model = random_model(CONFIGS["mlstm"])
    with pytest.raises(ValueError) as refused:
        ContinuousBatch(model, 0, prefill_tokens=0, prefix_cache_bytes=-1, vocab_size=97, batch_sizes=[3])
    assert str(refused.value) == (
        "slots must be at least 1, not 0; prefill_tokens must be at least 1, not 0; prefix_cache_bytes must be at "
        "least 0, not -1; vocab_size must be from 1 to the model's 96, not 97; batch_sizes must be positive and end "
        "with slots 0, not [3]"
    )
    batch = ContinuousBatch(model, 1, prefill_tokens=16)
    with pytest.raises(ValueError, match="top_p must be above 0 .*; the prompt is empty; give it"):
        batch.add([], SamplingSettings(1, top_p=0))
    with pytest.raises(ValueError, match="the prompt holds ids 1 to 96, the model has 0 to 95"):
        batch.add([1, 96], SamplingSettings(1))
    assert batch.waiting == 0
    batch.cancel(77)


def test_a_prompt_that_waits_for_its_turn_is_looked_up_once():
    model = random_model(CONFIGS["mlstm"])
    batch = ContinuousBatch(model, 2, prefill_tokens=16, prefix_cache_bytes=2**20)
    for token in (1, 2):
        batch.add([token] * 20, SamplingSettings(9, temperature=0))
    # The second prompt's piece does not fit behind the last four tokens of the first.
    assert [len(batch.step()) for _ in range(4)] == [0, 1, 1, 2]
    assert batch.prefix_cache.lookups == 2
