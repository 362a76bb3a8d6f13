"""Values of every configuration group, and the one function that turns them into dataclasses.

The YAML files here hold values only; each schema is a dataclass that lives with the code that uses it. `compose` is the
single way from YAML and command-line overrides to those dataclasses, used by every command line of the project.
`conf.problems` holds the words for what is wrong with a value; every package may import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conf.problems import ConfigError, suggestion

if TYPE_CHECKING:
    from conf.composition import CONF_DIR, compose, to_dataclass

__all__ = ["CONF_DIR", "ConfigError", "compose", "suggestion", "to_dataclass"]


def __getattr__(name: str) -> Any:
    # Hydra costs half a second, which validation and `--help` do without.
    if name in ("CONF_DIR", "compose", "to_dataclass"):
        from conf import composition

        return getattr(composition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
