"""Passwords in URLs (ftp://user:password@host/...): used where one is opened, and shown nowhere. Imports no package."""

from __future__ import annotations

import re
from typing import Any, TypeVar

# What stands in the place of a password.
HIDDEN = "***"
# In a text of any kind: user name, password. Neither has a slash. A path leaves one of two slashes of a URL.
_PASSWORD = re.compile(r"(:/{1,2}[^\s/:@]*):([^\s/]+)@")
Value = TypeVar("Value")


def without_passwords(value: Value) -> Value:
    """`value`, a text or what JSON knows, with `***` for each password of a URL in any of its texts."""
    return _hidden(value)


def password_of(url: str) -> str:
    """The password of `url`; empty where it has none."""
    found = _PASSWORD.search(url)
    return "" if found is None else found[2]


def has_hidden_password(url: str) -> bool:
    """Whether the password of `url` was hidden, so that it opens nothing."""
    return f":{HIDDEN}@" in url


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return _PASSWORD.sub(rf"\1:{HIDDEN}@", value)
    if isinstance(value, dict):
        return {_hidden(key): _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_hidden, value))
    return value
