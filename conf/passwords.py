"""Secrets in URLs (ftp://user:password@host/..., https://host/...?token=...): used where one is opened, and shown
nowhere. Imports no package."""

from __future__ import annotations

import re
from typing import Any, TypeVar

# What stands in the place of a password.
HIDDEN = "***"
# In a text of any kind: user name, password. Neither has a slash. A path leaves one of two slashes of a URL.
_PASSWORD = re.compile(r"(:/{1,2}[^\s/:@]*):([^\s/]+)@")
# What follows the path of a URL, and what of it is secret: signatures, keys and tokens of stores.
_QUERY = re.compile(r"(:/{1,2}[^\s?#]*\?)([^\s#]+)")
_SECRET = re.compile(
    r"((?:^|[&;])[^=&;]*(?:token|signature|secret|password|passwd|pwd|credential|auth|apikey|api_key|api-key|accesskeyid)"
    r"[^=&;]*=|(?:^|[&;])(?:sig|key|se)=)([^&;\s\"'<>)\],]+)",
    re.IGNORECASE,
)
Value = TypeVar("Value")


def without_passwords(value: Value) -> Value:
    """`value`, a text or what JSON knows, with `***` for each secret of a URL in any of its texts."""
    return _hidden(value)


def secrets_of(url: str) -> list[str]:
    """The password of `url`, and what of its query is secret."""
    found = [match[2] for match in _PASSWORD.finditer(url)]
    return found + [secret[2] for query in _QUERY.finditer(url) for secret in _SECRET.finditer(query[2])]


def has_hidden_password(url: str) -> bool:
    """Whether a secret of `url` was hidden, so that it opens nothing."""
    return HIDDEN in secrets_of(url)


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        value = _PASSWORD.sub(rf"\1:{HIDDEN}@", value)
        return _QUERY.sub(lambda query: query[1] + _SECRET.sub(rf"\1{HIDDEN}", query[2]), value)
    if isinstance(value, dict):
        return {_hidden(key): _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_hidden, value))
    return value
