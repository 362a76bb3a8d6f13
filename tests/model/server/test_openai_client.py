"""The client library of OpenAI against a real server, and the answers against the model asked alone."""

from __future__ import annotations

import math

import openai
import pytest
import torch

from tests.model.server.conftest import MAX_NEW_TOKENS, SLOTS
from tests.model.server.serving import SECONDS, Alone, Server

PROMPTS = ["def f(", "", "class Server:\n", "\u00e9\u4e2d\U0001f469"]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def test_the_model_is_listed_with_what_it_is(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("small", "model", "xlstm-pretrain")
    assert model.parameters > 10_000 and model.state_bytes_per_sequence > 1000
    assert (model.max_prompt_tokens, model.max_new_tokens) == (400, MAX_NEW_TOKENS)
    assert model.chat_template == "plain" and model.chat_note.startswith("no chat training is known")
    assert client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; it is small"):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_text_is_what_the_model_gives_alone(client, alone, prompt, stream):
    given = {"model": "small", "prompt": prompt, "max_tokens": 30, "temperature": 0}
    ids = alone.ids(prompt, 30)
    expected_end = "stop" if ids[-1] == alone.tokenizer.eod_id else "length"
    if stream:
        chunks = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
        assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices == []
        assert all(chunk.usage is None for chunk in chunks[:-1])
        usage, ends = chunks[-1].usage, [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
        assert ends == [None] * (len(ends) - 1) + [expected_end]
        text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    else:
        answer = client.completions.create(**given)
        usage, text, end = answer.usage, answer.choices[0].text, answer.choices[0].finish_reason
        assert end == expected_end
    assert text == alone.text(prompt, 30)
    read = 1 + len(alone.tokenizer.encode(prompt))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (read, len(ids), read + len(ids))


def test_prompts_may_be_ids_and_several(client, alone, endless):
    ids = [endless, [7] * 70]
    answer = client.completions.create(model="small", prompt=ids, max_tokens=8, temperature=0, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        prompt = ids[choice.index // 2]
        assert choice.text == alone.tokenizer.decode(prompt) + alone.text(prompt, 8)
    new = [len(alone.ids(prompt, 8)) for prompt in ids]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (71, 2 * sum(new))


def test_echo_gives_the_prompt_first_also_in_a_stream(client, alone):
    given = {"model": "small", "prompt": "import os", "max_tokens": 6, "temperature": 0, "echo": True}
    expected = "import os" + alone.text("import os", 6)
    assert client.completions.create(**given).choices[0].text == expected
    chunks = list(client.completions.create(**given, stream=True))
    assert chunks[0].choices[0].text == "import os" and "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_a_stop_string_ends_the_text_before_it(client, alone, endless):
    whole = alone.text(endless, 60)
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    given = {"model": "small", "prompt": endless, "max_tokens": 60, "temperature": 0, "stop": ["no such text", stop]}
    answer = client.completions.create(**given)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    assert 0 < answer.usage.completion_tokens < 60
    chunks = list(client.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_end_of_a_document_ends_an_answer_without_text(client, alone, ending):
    count = MAX_NEW_TOKENS
    ids = alone.ids(ending, count)
    assert ids[-1] == alone.tokenizer.eod_id and len(ids) <= count
    answer = client.completions.create(model="small", prompt=ending, max_tokens=count, temperature=0, logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (alone.text(ending, count), "stop")
    # The token that ended it was generated, and has neither text nor an entry.
    assert answer.usage.completion_tokens == len(ids) == len(answer.choices[0].logprobs.tokens) + 1


def test_a_seed_repeats_and_choices_differ(client):
    given = {"model": "small", "prompt": "def f(", "max_tokens": 20, "temperature": 1.2, "n": 3}
    first = [choice.text for choice in client.completions.create(**given, seed=5).choices]
    assert [choice.text for choice in client.completions.create(**given, seed=5).choices] == first
    assert [choice.text for choice in client.completions.create(**given, seed=6).choices] != first
    assert len(set(first)) == 3
    assert len({client.completions.create(**given).choices[0].text for _ in range(3)}) > 1


def test_sampling_settings_reach_the_model(client, alone):
    given = {"model": "small", "prompt": "def f(", "max_tokens": 20, "temperature": 3.0}
    greedy = alone.text("def f(", 20)
    assert client.completions.create(**given, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**given, top_p=1e-9).choices[0].text == greedy
    assert client.completions.create(**given, extra_body={"min_p": 1.0}).choices[0].text == greedy
    given["temperature"] = 0
    assert client.completions.create(**given, extra_body={"repetition_penalty": 50}).choices[0].text != greedy


def test_logprobs_of_a_completion_are_those_of_the_model(client, alone, endless):
    answer = client.completions.create(model="small", prompt=endless, max_tokens=12, temperature=0, logprobs=3)
    given = answer.choices[0].logprobs
    ids = alone.ids(endless, 12)
    expected, likeliest = _logprobs(alone, endless, ids)
    assert given.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert len(given.tokens) == len(given.text_offset) == 12
    for entry, best in zip(given.top_logprobs, likeliest, strict=True):
        # Of several tokens that are spelled alike, the likeliest counts.
        assert max(entry.values()) == pytest.approx(best[0], abs=1e-4) and 1 <= len(entry) <= 3


def test_logprobs_of_a_chat_are_those_of_the_model(client, alone):
    chat = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    ids = alone.ids("User: hi\n\nAssistant:", 9)
    ids = ids[:-1] if ids[-1] == alone.tokenizer.eod_id else ids
    before = [alone.tokenizer.eod_id, *alone.tokenizer.encode("User: hi\n\nAssistant:")]
    expected, likeliest = _logprobs(alone, before, ids)
    entries = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-4)
    for entry, best in zip(entries, likeliest, strict=True):
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best[:2], abs=1e-4)
        assert entry.token == entry.top_logprobs[0].token and bytes(entry.bytes).decode() == entry.token
    streamed = client.chat.completions.create(**chat, logprobs=True, stream=True)
    parts = [entry for chunk in streamed for entry in (chunk.choices[0].logprobs or _NONE).content]
    assert [part.token for part in parts] == [entry.token for entry in entries]
    assert client.chat.completions.create(**chat).choices[0].logprobs is None


class _NONE:
    content = ()


def _logprobs(alone: Alone, before: list[int], ids: list[int]) -> tuple[list[float], list[list[float]]]:
    """Of each new token, and the three highest at its place, from the whole text at once."""
    with torch.no_grad():
        logits = alone.model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
    of_all = torch.log_softmax(logits[:, : alone.tokenizer.vocab_size].double(), dim=-1)
    return of_all[range(len(ids)), ids].tolist(), of_all.topk(3).values.tolist()


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_goes_on_with_the_plain_form(client, alone, stream):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "And 2 + 2?"}]},
    ]
    prompt = "System: Be brief.\n\nUser: What is 1 + 1?\n\nAssistant: 2\n\nUser: And 2 + 2?\n\nAssistant:"
    given = {"model": "small", "messages": messages, "max_completion_tokens": 25, "temperature": 0, "n": 2}
    expected = alone.text(prompt, 25)
    if stream:
        chunks = list(client.chat.completions.create(**given, stream=True))
        for index in (0, 1):
            deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].index == index]
            assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
            assert "".join(delta.content or "" for delta in deltas) == expected
    else:
        answer = client.chat.completions.create(**given)
        assert [choice.message.content for choice in answer.choices] == [expected] * 2
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == 1 + len(alone.tokenizer.encode(prompt))


def test_usage_may_come_with_every_chunk(client, endless):
    options = {"continuous_usage_stats": True}
    given = {"model": "small", "prompt": endless, "max_tokens": 40, "temperature": 0, "stream": True}
    counts = [c.usage.completion_tokens for c in client.completions.create(**given, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 40 and len(counts) > 3


def test_errors_are_those_that_the_client_knows(client, server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here; it is small"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens: must be from 1 to 500, not 501") as refused:
        client.completions.create(model="small", prompt="x", max_tokens=501)
    assert (refused.value.param, refused.value.type) == ("max_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="prompt: has 401 tokens, more than the 400") as refused:
        client.completions.create(model="small", prompt=[3] * 401)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="prompt: token ids must be from 0 to 369"):
        client.completions.create(model="small", prompt=[370])
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: token ids must be from 0 to 369"):
        client.completions.create(model="small", prompt=[[1], [-1]])
    with pytest.raises(openai.APIStatusError, match="longer than the 20000 bytes") as refused:
        client.completions.create(model="small", prompt="x" * 20001)
    assert refused.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="n: must be from 1 to 16"):
        client.completions.create(model="small", prompt="x", n=SLOTS + 12 + 1)


def test_a_full_queue_is_said_with_when_to_come_again(client, server, endless):
    given = {
        "model": "small",
        "prompt": endless,
        "n": 8,
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    streams = [client.completions.create(**given) for _ in range(2)]
    server.wait_until("xlstm_sequences_running", SLOTS)
    with pytest.raises(openai.RateLimitError, match="16 of 16 sequences are running or wait, no room for 1") as refused:
        client.completions.create(model="small", prompt="x")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.type == "rate_limit_error" and refused.value.code == "rate_limit_exceeded"
    streams[0].close()
    server.wait_until("xlstm_sequences_admitted", 8)
    streams[1].close()
    assert client.completions.create(model="small", prompt="x", max_tokens=1).choices[0].finish_reason == "length"


def test_least_logprobs_are_numbers_of_json():
    from model.server.responses import _finite

    assert _finite(-math.inf) == -9999.0 and _finite(-0.5) == -0.5
