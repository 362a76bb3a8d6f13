"""What a body asks for; whatever is wrong with it is refused at once, by name."""

from __future__ import annotations

from typing import Any

import pytest

from model.generation.sampling import SamplingSettings
from model.server.errors import ApiError
from model.server.limits import Limits
from model.server.request_fields import parse_json
from model.server.requests import CompletionRequest, Message, read_chat, read_completion

LIMITS = Limits(slots=2, queue=6, max_new_tokens=10_000)
TURN = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return read_completion({"model": "m", "prompt": "x", **fields}, "m", LIMITS, 100)


def chat(**fields: Any) -> CompletionRequest:
    return read_chat({"model": "m", "messages": TURN, **fields}, "m", LIMITS, 100)


def test_defaults_are_those_of_openai():
    read = completion(seed=1)
    assert read == CompletionRequest(
        ("x",), (), 1, SamplingSettings(16, temperature=1.0, seed=1), (), False, False, False, False
    )
    read = chat(seed=1)
    assert (read.settings.max_new_tokens, read.is_chat, read.messages) == (10_000, True, (Message("user", "hi"),))


def test_without_a_seed_each_request_draws_anew():
    assert completion().settings.seed != completion().settings.seed


def test_every_setting_arrives():
    read = completion(
        max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=-4, logprobs=2
    )
    assert read.settings == SamplingSettings(7, 0.5, 3, 0.9, 0.1, 1.2, -4, (), 2)
    read = completion(n=2, stop=["a", "b"], echo=True, stream=True, stream_options={"include_usage": True})
    assert (read.n, read.stop, read.echo, read.stream, read.include_usage) == (2, ("a", "b"), True, True, True)
    assert completion(stop="ab").stop == ("ab",)
    read = chat(logprobs=True, top_logprobs=3, max_completion_tokens=4)
    assert (read.settings.logprobs, read.settings.max_new_tokens) == (3, 4)
    assert chat(logprobs=True).settings.logprobs == 0
    assert chat(logprobs=False).settings.logprobs is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
        (None, ("",)),
    ],
)
def test_prompts_are_texts_or_ids(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], {}, 3, [True], ["a", 1], [1, "a"], [1.5], [[1], []], [None]])
def test_prompts_that_are_neither_are_refused(prompt):
    with pytest.raises(ApiError, match="prompt: must be a text, token ids") as refused:
        completion(prompt=prompt)
    assert (refused.value.status, refused.value.parameter) == (400, "prompt")


# What changes nothing may be said.
@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1, "suffix": None},
        {"n": 2, "best_of": 2},
        {"stream": False, "stream_options": None, "stop": None, "logprobs": None},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(fields):
    completion(**fields)


def test_chat_fields_that_ask_for_nothing_are_taken():
    chat(
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        max_tokens=5,
        max_completion_tokens=5,
    )
    answered = {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    read = chat(messages=[*TURN, answered, parts])
    assert read.messages == (Message("user", "hi"), Message("assistant", "ho"), Message("user", "ab"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: must be from 1 to 10000, not 0"),
        ({"max_tokens": 10_001}, "max_tokens: must be from 1 to 10000, not 10001"),
        ({"max_tokens": 1.5}, "max_tokens: must be a whole number, not 1.5"),
        ({"max_tokens": True}, "max_tokens: must be a whole number, not true"),
        ({"temperature": -1}, "temperature: must be 0"),
        ({"temperature": "hot"}, "temperature: must be a number, not a text"),
        ({"temperature": float("nan")}, "temperature: must be a number, not nan"),
        ({"temperature": 10**400}, "temperature: must be a number, not a very large number"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"top_k": 0}, "top_k: must be from 1"),
        ({"min_p": 2}, "min_p: must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be positive"),
        ({"seed": 2**63}, "seed: must be from"),
        ({"n": 9}, "n: must be from 1 to 8, not 9"),
        ({"n": 3, "prompt": ["a", "b", "c"]}, "prompt: 3 prompts, each continued 3 times, are more than 8 sequences"),
        ({"stop": [1]}, "stop: must be a text or a list of texts"),
        ({"stop": ""}, "stop: a text must have from 1 to 128 characters"),
        ({"stop": ["a"] * 17}, "stop: at most 16 texts are taken, not 17"),
        ({"stop": "\ud800"}, "stop: holds half a surrogate pair"),
        ({"prompt": "\ud800"}, "prompt: holds half a surrogate pair"),
        ({"stream": "yes"}, "stream: must be true or false, not a text"),
        ({"stream_options": {"include_usage": True}}, "stream_options: needs stream=true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options: must be an object whose fields"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation is not supported"),
        ({"logprobs": 21}, "logprobs: must be from 0 to 20, not 21"),
        ({"logprobs": 20, "n": 8, "max_tokens": 10_000}, "logprobs: 1680000 of them are more than the 262144 of one"),
        ({"logprobs": 1, "echo": True}, "echo: goes without logprobs"),
        ({"best_of": 2}, "best_of: every continuation is given"),
        ({"suffix": "x"}, "suffix: text is continued, not filled in"),
        ({"presence_penalty": 0.5}, "presence_penalty: is not supported; repetition_penalty is"),
        ({"logit_bias": {"5": 1}}, "logit_bias: is not supported"),
        ({"user": 3}, "user: must be a label"),
        ({"max_token": 3}, r"max_token: no such field is known here \(did you mean 'max_tokens'\?\)"),
        ({"messages": TURN}, "messages: no such field is known here"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said(fields, message):
    with pytest.raises(ApiError, match=message) as refused:
        completion(**fields)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: must be a list of one message or more"),
        ({"messages": ["hi"]}, r"messages\[0\]: must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]\.role: must be one of system, developer"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\]\.content: must be a te"),
        ({"messages": [{**TURN[0], "name": "Eve"}]}, r"messages\[0\]\.name: is not supported"),
        ({"messages": [{**TURN[0], "tone": "x"}]}, r"messages\[0\]\.tone: is not supported"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, r"messages\[0\]\.content: holds half a surrogate"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs=true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens: differs from max_completion_tokens"),
        ({"tools": [{}]}, "tools: the model calls no tools"),
        ({"tool_choice": "required"}, "tool_choice: the model calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format: answers are text in no further format"),
        ({"reasoning_effort": "low"}, "reasoning_effort: is not supported"),
        ({"store": True}, "store: nothing is kept of a request"),
        ({"modalities": ["audio"]}, "modalities: answers are text"),
        ({"prompt": "x"}, "prompt: no such field is known here"),
        ({"echo": True}, "echo: no such field is known here"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said(fields, message):
    with pytest.raises(ApiError, match=message) as refused:
        chat(**fields)
    assert refused.value.status == 400


def test_all_problems_come_at_once_and_the_first_gives_its_name():
    with pytest.raises(ApiError) as refused:
        completion(top_p=2, n=0, other=1)
    assert all(key in str(refused.value) for key in ("top_p: ", "n: ", "other: "))
    assert refused.value.body["error"] == {
        "message": str(refused.value),
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }


def test_another_model_is_not_found():
    with pytest.raises(ApiError, match="there is no model 'gpt' here; it is m") as refused:
        completion(model="gpt")
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match="model: must be named; it is m"):
        completion(model=None)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"3", b"null", b'{"a": }', b"\xff{}", b"[" * 100_000, b"9" * 5000, b'{"a": 1} x']
)
def test_bodies_that_are_no_json_object_are_refused(body):
    with pytest.raises(ApiError, match="the body") as refused:
        parse_json(body)
    assert refused.value.status == 400
