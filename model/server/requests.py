"""The bodies of /v1/completions and /v1/chat/completions as typed requests.

What would change the answer and is not supported is refused. Fields beyond OpenAI's interface that clients of other
servers know (`top_k`, `min_p`, `repetition_penalty`, `stream_options.continuous_usage_stats`) are taken too.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.generation.sampling import SamplingSettings
from model.server.errors import ApiError
from model.server.limits import MAX_LOGPROB_ENTRIES, MAX_LOGPROBS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, Limits
from model.server.request_fields import RequestFields

# OpenAI's default for /v1/completions.
DEFAULT_MAX_TOKENS = 16
ROLES = ("system", "developer", "user", "assistant")
# Fields of a message that clients send back as they got them.
EMPTY_MESSAGE_FIELDS = ("annotations", "audio", "function_call", "name", "refusal", "tool_calls")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class CompletionRequest:
    """What both interfaces have in common once they are read.

    Attributes:
        prompts: texts or token ids, each continued `n` times; empty for a chat.
        messages: of a chat; empty otherwise.
        settings: of every continuation but for the seed, which is this one plus the continuation's number.
        stop: texts that end a continuation and are no part of it.
        echo: give the prompt's text before what continues it.
        include_usage: end a stream with the numbers of tokens; `continuous_usage`: give them with every chunk.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Message, ...]
    n: int
    settings: SamplingSettings
    stop: tuple[str, ...]
    echo: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


def read_completion(values: dict[str, Any], model: str, limits: Limits, vocab_size: int) -> CompletionRequest:
    """A body of /v1/completions. Raises ApiError: 404 for another model, 400 for all else that is wrong."""
    fields = RequestFields(values)
    _read_model(fields, model)
    prompts = _read_prompts(fields)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    echo = fields.boolean("echo")
    if echo and logprobs is not None:
        fields.problem("echo", "goes without logprobs: those of a prompt's own tokens are not computed")
    fields.only("suffix", [""], "text is continued, not filled in")
    best_of, n = fields.take("best_of"), fields.take("n")
    if best_of not in (None, 1 if n is None else n):
        fields.problem("best_of", "every continuation is given, none is chosen; leave it out")
    max_new_tokens = fields.integer("max_tokens", 1, limits.max_new_tokens) or DEFAULT_MAX_TOKENS
    max_new_tokens = min(max_new_tokens, limits.max_new_tokens)
    return _finished(fields, limits, vocab_size, prompts, (), echo, max_new_tokens, logprobs)


def read_chat(values: dict[str, Any], model: str, limits: Limits, vocab_size: int) -> CompletionRequest:
    """A body of /v1/chat/completions. Raises ApiError: 404 for another model, 400 for all else that is wrong."""
    fields = RequestFields(values)
    _read_model(fields, model)
    messages = _read_messages(fields)
    wants_logprobs = fields.boolean("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top_logprobs is not None and not wants_logprobs:
        fields.problem("top_logprobs", "needs logprobs=true")
    longest = fields.integer("max_completion_tokens", 1, limits.max_new_tokens)
    older = fields.integer("max_tokens", 1, limits.max_new_tokens)
    if longest is not None and older is not None and longest != older:
        fields.problem("max_tokens", "differs from max_completion_tokens, its newer name; give one of them")
    for key in ("tools", "functions"):
        fields.only(key, [[]], "the model calls no tools")
    fields.only("tool_choice", ["none", "auto"], "the model calls no tools")
    fields.only("function_call", ["none", "auto"], "the model calls no tools")
    fields.only("parallel_tool_calls", [True, False], "must be true or false, and changes nothing")
    fields.only("response_format", [{"type": "text"}], "answers are text in no further format")
    fields.only("modalities", [["text"]], "answers are text")
    for key in ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"):
        fields.only(key, [], "is not supported")
    fields.only("store", [False], "nothing is kept of a request")
    _ignore_labels(fields, "metadata")
    fields.only("service_tier", ["auto", "default"], "there is one tier")
    logprobs = (top_logprobs or 0) if wants_logprobs else None
    max_new_tokens = longest or older or limits.max_new_tokens
    return _finished(fields, limits, vocab_size, (), messages, False, max_new_tokens, logprobs)


def _finished(
    fields: RequestFields,
    limits: Limits,
    vocab_size: int,
    prompts: tuple[str | tuple[int, ...], ...],
    messages: tuple[Message, ...],
    echo: bool,
    max_new_tokens: int,
    logprobs: int | None,
) -> CompletionRequest:
    most = limits.slots + limits.queue
    n = fields.integer("n", 1, most) or 1
    if len(prompts) * n > most:
        fields.problem("prompt", f"{len(prompts)} prompts, each continued {n} times, are more than {most} sequences")
    entries = max(1, len(prompts)) * n * max_new_tokens * (1 + (logprobs or 0))
    if logprobs is not None and entries > MAX_LOGPROB_ENTRIES:
        fields.problem("logprobs", f"{entries} of them are more than the {MAX_LOGPROB_ENTRIES} of one answer")
    _ignore_labels(fields, "user")
    for key in ("presence_penalty", "frequency_penalty"):
        fields.only(key, [0, 0.0], "is not supported; repetition_penalty is")
    fields.only("logit_bias", [{}], "is not supported")
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    settings = SamplingSettings(
        max_new_tokens=max_new_tokens,
        temperature=fields.number("temperature", 1.0),
        top_k=fields.integer("top_k", 1, 2**31),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        seed=secrets.randbits(62) if seed is None else seed,
        logprobs=None if logprobs is None else min(logprobs, vocab_size),
    )
    for text in settings.problems(vocab_size):
        key, _, rest = text.partition(" ")
        fields.problem(key, rest)
    stop = fields.strings("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS)
    stream = fields.boolean("stream")
    include_usage, continuous_usage = _read_stream_options(fields, stream)
    fields.finish()
    return CompletionRequest(
        prompts, messages, n, settings, stop, echo, stream, include_usage or continuous_usage, continuous_usage
    )


def _read_model(fields: RequestFields, model: str) -> None:
    wanted = fields.take("model")
    if not isinstance(wanted, str):
        fields.problem("model", f"must be named; it is {model}")
    elif wanted != model:
        raise ApiError(
            404, f"there is no model {wanted!r} here; it is {model}", parameter="model", code="model_not_found"
        )


def _read_prompts(fields: RequestFields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.take("prompt")
    if value is None:
        # As in OpenAI's interface, where it stands for the beginning of a document.
        return ("",)
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        value = [value]
    prompts: list[str | tuple[int, ...]] = []
    for prompt in value if isinstance(value, list) else ():
        if isinstance(prompt, str):
            prompts.append(prompt)
        elif isinstance(prompt, list) and prompt and all(_is_id(token) for token in prompt):
            prompts.append(tuple(prompt))
        else:
            break
    if not prompts or len(prompts) != len(value):
        fields.problem("prompt", "must be a text, token ids, or a list of some of these, none without a token")
    fields.check_text("prompt", [prompt for prompt in prompts if isinstance(prompt, str)])
    return tuple(prompts)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_messages(fields: RequestFields) -> tuple[Message, ...]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.problem("messages", "must be a list of one message or more")
        return ()
    messages = []
    for number, given in enumerate(value):
        key = f"messages[{number}]"
        if not isinstance(given, dict):
            fields.problem(key, "must be an object with role and content")
            continue
        if given.get("role") not in ROLES:
            fields.problem(f"{key}.role", f"must be one of {', '.join(ROLES)}")
        for name in given:
            if name not in ("role", "content", *EMPTY_MESSAGE_FIELDS) or (
                name in EMPTY_MESSAGE_FIELDS and given[name] not in (None, [])
            ):
                fields.problem(f"{key}.{name}", "is not supported; leave it out")
        content = _text_of(given.get("content"))
        if content is None:
            fields.problem(f"{key}.content", 'must be a text, or a list of parts {"type": "text", "text": TEXT}')
            continue
        fields.check_text(f"{key}.content", [content])
        messages.append(Message(str(given.get("role")), content))
    return tuple(messages)


def _text_of(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" and len(part) == 2 else None
        for part in content
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]


def _read_stream_options(fields: RequestFields, stream: bool) -> tuple[bool, bool]:
    value = fields.take("stream_options")
    if value is None:
        return False, False
    known: Sequence[str] = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    if not isinstance(value, dict) or not all(key in known and isinstance(given, bool) for key, given in value.items()):
        fields.problem("stream_options", f"must be an object whose fields {', '.join(known)} are true or false")
        return False, False
    if not stream:
        fields.problem("stream_options", "needs stream=true")
    if value.get("include_obfuscation"):
        fields.problem("stream_options", "include_obfuscation is not supported; set it to false or leave it out")
    return value.get("include_usage", False), value.get("continuous_usage_stats", False)


def _ignore_labels(fields: RequestFields, key: str) -> None:
    """What a client calls its own; no part of an answer depends on it, by OpenAI's interface too."""
    value = fields.take(key)
    if value is not None and not isinstance(value, str | dict):
        fields.problem(key, "must be a label")
