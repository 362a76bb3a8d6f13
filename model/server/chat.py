"""Messages of a chat as the tokens that a model continues.

The template is the one in the tokenizer's folder, as `transformers` writes it (`chat_template.jinja`, or
`chat_template` in `tokenizer_config.json`). Without one there is a plain form, for models that were trained on text
alone:

    System: TEXT

    User: TEXT

    Assistant:
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.sandbox

from model.server.errors import ApiError
from model.server.requests import Message

PLAIN_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
# Where a model goes on with what is the user's to say.
PLAIN_STOP = "\n\nUser:"


class ChatTokenizer(Protocol):
    """What this file needs of a tokenizer; data_pipeline.tokenizing.tokenizer.Tokenizer has it."""

    eod_id: int
    # Spelling -> id of those that no text becomes.
    control_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]: ...


class ChatTemplate(Protocol):
    """How a chat becomes tokens."""

    # "plain" or "tokenizer".
    name: str
    # Besides the end of a document, what ends an answer.
    stop_strings: tuple[str, ...]
    stop_tokens: tuple[int, ...]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Raises ApiError (400): the template does not take such messages."""


class PlainChat:
    """The form above, for a model of which no chat training is known."""

    name = "plain"
    stop_strings: tuple[str, ...] = (PLAIN_STOP,)
    stop_tokens: tuple[int, ...] = ()

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[Message]) -> list[int]:
        turns = [f"{PLAIN_NAMES[message.role]}: {message.content}" for message in messages]
        return [self._tokenizer.eod_id, *self._tokenizer.encode("\n\n".join([*turns, "Assistant:"]))]


class TemplateChat:
    """The template of the tokenizer's folder."""

    name = "tokenizer"
    stop_strings: tuple[str, ...] = ()

    def __init__(self, tokenizer: ChatTokenizer, template: str, names: Mapping[str, str], stop_tokens: tuple[int, ...]):
        """`names`: what the template may call the special tokens, such as bos_token. Raises ValueError."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno} cannot be read ({error.message})") from None
        self._tokenizer, self._names, self.stop_tokens = tokenizer, dict(names), stop_tokens

    def encode(self, messages: Sequence[Message]) -> list[int]:
        # What a user types is text, also where it spells a control token: a character that occurs nowhere else breaks
        # the spelling until the template's own control tokens are found.
        taken = {character for message in messages for character in message.content}
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in taken)
        turns = [{"role": message.role, "content": self._broken(message.content, mark)} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(
                400, f"messages: the template of the model does not take them ({error})", parameter="messages"
            ) from None
        return [token for part in self._parts(text) for token in self._tokens(part, mark)]

    def _broken(self, text: str, mark: str) -> str:
        for spelling in self._tokenizer.control_tokens:
            text = text.replace(spelling, mark.join(spelling) if len(spelling) > 1 else mark + spelling + mark)
        return text

    def _parts(self, text: str) -> list[str]:
        """`text` cut at the spellings of control tokens, each a part of its own."""
        parts = [text]
        # Of two that begin alike the longer one is meant.
        for spelling in sorted(self._tokenizer.control_tokens, key=len, reverse=True):
            cut: list[str] = []
            for part in parts:
                if part in self._tokenizer.control_tokens:
                    cut.append(part)
                    continue
                first, *rest = part.split(spelling)
                cut += [first, *(piece for other in rest for piece in (spelling, other))]
            parts = [part for part in cut if part]
        return parts

    def _tokens(self, part: str, mark: str) -> list[int]:
        token = self._tokenizer.control_tokens.get(part)
        return self._tokenizer.encode(part.replace(mark, "")) if token is None else [token]


def chat_template(tokenizer: ChatTokenizer, path: Path) -> ChatTemplate:
    """The template beside the tokenizer at `path`, its file or folder; the plain form where there is none.

    Raises ValueError: a file there cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path)
    template_path = folder / "chat_template.jinja"
    template: Any = config.get("chat_template")
    if template_path.is_file():
        template = template_path.read_text(encoding="utf-8")
    else:
        template_path = config_path
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None:
        return PlainChat(tokenizer)
    if not isinstance(template, str):
        raise ValueError(f"{template_path}: chat_template is no text")
    names = {key: _spelling(config[key]) for key in config if key.endswith("_token")}
    known = {key: spelling for key, spelling in names.items() if spelling is not None}
    try:
        return TemplateChat(tokenizer, template, known, _turn_ends(tokenizer, folder, known.get("eos_token")))
    except ValueError as error:
        raise ValueError(f"{template_path}: chat_template: {error}") from None


def _turn_ends(tokenizer: ChatTokenizer, folder: Path, eos_token: str | None) -> tuple[int, ...]:
    ids = _read_object(folder / "generation_config.json").get("eos_token_id")
    found = [token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]
    if eos_token in tokenizer.control_tokens:
        found.append(tokenizer.control_tokens[eos_token])
    return tuple(dict.fromkeys(found))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON that can be read ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no JSON object")
    return content


def _spelling(token: Any) -> str | None:
    """Of a special token, as transformers writes it: a text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
