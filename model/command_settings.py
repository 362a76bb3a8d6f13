"""What the commands of `python -m model` read from KEY=VALUE arguments, and refuse in the same words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from conf import ConfigError, suggestion
from conf.problems import local_folder

# PyTorch takes a while to import: what needs it does so.
if TYPE_CHECKING:
    import torch

Settings = TypeVar("Settings")


def read_settings(schema: type[Settings], arguments: list[str], also: tuple[str, ...] = ()) -> Settings:
    """KEY=VALUE arguments as an instance of `schema`. Values are taken as they stand, so paths need no quoting.

    `also`: keys that the caller has read itself, for the message about one that is unknown. Raises ConfigError.
    """
    known = [field.name for field in fields(cast(Any, schema))]
    optional = [field.name for field in fields(cast(Any, schema)) if field.default is None]
    values: dict[str, str | None] = {}
    problems = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        choices = [*known, *also]
        if not separator:
            problems.append(
                f"'{argument}': no key is given; settings are typed KEY=VALUE, such as {known[0]}={argument}; they are "
                f"{', '.join(choices)}"
            )
        elif key not in known:
            problems.append(f"{argument}: no such setting{suggestion(key, choices)}; settings are {', '.join(choices)}")
        elif key in optional and value.lower() in ("none", "true", "false"):
            problems.append(f"{key}: a text or null is wanted, not {value}; write {key}=null for none")
        values[key] = None if value == "null" else value
    if problems:
        raise ConfigError(problems)
    from conf import to_dataclass

    return to_dataclass(schema, values)


def refuse_url(output: str) -> None:
    """Raise ConfigError for an output that is no folder of this machine."""
    if problems := local_folder("output", output):
        raise ConfigError(problems)


def dtype_named(name: str) -> torch.dtype:
    """float32 or bfloat16. Raises ConfigError for another name."""
    import torch

    if name not in ("float32", "bfloat16"):
        raise ConfigError([f"dtype: unknown value '{name}'; choose float32 or bfloat16"])
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def device_named(name: str) -> torch.device:
    """The device, with its index. Raises ConfigError where this machine has none of that name."""
    import torch

    try:
        return torch.empty(0, device=name).device
    # PyTorch without CUDA says so with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"device: '{name}' cannot be used here ({reason}); give cpu, cuda or cuda:1"]) from None


def tokenizer_path(given: str | None, found: Path | None) -> str | Path:
    """The tokenizer that the command names, else the one beside the weights. Raises ConfigError: there is none."""
    path = given or found
    if path is None:
        raise ConfigError(["tokenizer: the checkpoint has none beside it; give the file or folder, tokenizer=PATH"])
    return path
