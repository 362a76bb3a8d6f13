"""What may have become of a file: bytes, numbers and keys changed, or another kind of thing in its place.

A mutation gets the file, a generator of random numbers, and a file elsewhere that nothing may write to.
"""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Path, Random, Path], None]
# What a number, or any other value, becomes. json.dumps writes those that JSON has no word for as Python does.
STRANGE = (
    10**30,
    -1,
    0,
    2**63,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "7",
    "",
    "../../elsewhere",
    "/etc/hostname",
    "\ud800",
    None,
    True,
    [],
    {},
    [1, 2],
    ["x"],
    {"x": 1},
)
# Deeper than a parser recurses.
DEPTH = 200_000
# Texts in the place of a number of a YAML file.
STRANGE_YAML = ("-1", "0", "1e308", ".nan", ".inf", str(10**30), "''", "text", "[1, 2]", "{x: 1}", "null", "*x", "${a}")


def _flip(content: bytearray, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 4, 64))):
        if content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return content


def _range(content: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(content) + 1)
    return start, min(len(content), start + random.choice((1, 8, 100, 5000)))


def _zero(content: bytearray, random: Random) -> bytes:
    start, end = _range(content, random)
    content[start:end] = bytes(end - start)
    return content


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.choice((len(content) // 2, len(content) - 1, random.randrange(len(content) + 1)))]


def _append(content: bytes, random: Random) -> bytes:
    return content + random.choice(
        (b"\0" * 512, b"\xff\xfe", b"{}\n", b'{"event": 3}\n[1]\n{"kind": "train"}\n', content)
    )


def _duplicate(content: bytes, random: Random) -> bytes:
    start, end = _range(content, random)
    return content[:end] + content[start:end] + content[end:]


def _swap(content: bytes, random: Random) -> bytes:
    a, b = sorted((_range(content, random), _range(content, random)))
    if a[1] > b[0]:
        return content[a[0] :] + content[: a[0]]
    return content[: a[0]] + content[b[0] : b[1]] + content[a[1] : b[0]] + content[a[0] : a[1]] + content[b[1] :]


def _of_bytes(change: Callable[[bytearray, Random], bytes]) -> Mutation:
    def mutate(path: Path, random: Random, outside: Path) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), random))

    return mutate


def _without(path: Path, random: Random, outside: Path) -> None:
    path.unlink()


def _folder(path: Path, random: Random, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, random: Random, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_out(path: Path, random: Random, outside: Path) -> None:
    """To a file elsewhere, which holds the same half of the time, or to none at all."""
    kind = random.randrange(3)
    if kind == 0:
        outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside if kind < 2 else outside.with_name("nothing"))


def _endless_link(path: Path, random: Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _device(path: Path, random: Random, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _empty(path: Path, random: Random, outside: Path) -> None:
    path.write_bytes(b"")


def _unreadable(path: Path, random: Random, outside: Path) -> None:
    path.chmod(0)


def _deep(path: Path, random: Random, outside: Path) -> None:
    path.write_text("[" * DEPTH)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += [(value, key), *_places(item)]
    return found


def change_json(document: Any, random: Random) -> Any:
    """`document` with some values replaced, or keys deleted, renamed or copied."""
    for _ in range(random.choice((1, 1, 2, 5))):
        places = _places(document)
        if not places or random.random() < 0.03:
            return copy.deepcopy(random.choice(STRANGE))
        container, key = random.choice(places)
        way = random.randrange(4)
        if way == 0 and isinstance(container, dict):
            del container[key]
        elif way == 1 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        elif way == 2:
            other, of_other = random.choice(places)
            container[key] = copy.deepcopy(other[of_other])
        else:
            container[key] = copy.deepcopy(random.choice(STRANGE))
    return document


def _json(path: Path, random: Random, outside: Path) -> None:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    if lines:
        row = random.randrange(len(lines))
        lines[row] = json.dumps(change_json(json.loads(lines[row]), random))
    path.write_text("\n".join([*lines, ""]))


def _json_lines_out_of_order(path: Path, random: Random, outside: Path) -> None:
    lines = path.read_text().splitlines()
    random.shuffle(lines)
    path.write_text("\n".join([*lines, ""]))


def _yaml(path: Path, random: Random, outside: Path) -> None:
    """One line of a YAML file gone, twice there, at another depth, or with another value."""
    lines = path.read_text().splitlines()
    for _ in range(random.choice((1, 1, 3))):
        row, way = random.randrange(len(lines)), random.randrange(5)
        if way == 0 and len(lines) > 1:
            del lines[row]
        elif way == 1:
            lines.insert(row, lines[row])
        elif way == 2:
            lines[row] = f" {lines[row]}" if random.random() < 0.5 else lines[row].lstrip()
        else:
            lines[row] = re.sub(r":.*|(?<=- ).*", f": {random.choice(STRANGE_YAML)}", lines[row])
    path.write_text("\n".join([*lines, ""]))


def _safetensors_header(path: Path, random: Random, outside: Path) -> None:
    """Another header of a safetensors file, whole by itself: JSON behind its length, then the tensors' bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "shapes" in metadata and random.random() < 0.5:
        metadata["shapes"] = json.dumps(change_json(json.loads(metadata["shapes"]), random))
    else:
        header = change_json(header, random)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _numbers_in_text(path: Path, random: Random, outside: Path) -> None:
    content = path.read_bytes()
    numbers = list(re.finditer(rb"-?\d+", content))
    if numbers:
        found = random.choice(numbers)
        other = random.choice((b"-1", b"9" * 25, b"NaN", b"x", b"1e999", b"0", b""))
        path.write_bytes(content[: found.start()] + other + content[found.end() :])


_OF_BYTES = {
    change.__name__.strip("_"): _of_bytes(change) for change in (_flip, _zero, _truncate, _append, _duplicate, _swap)
}
_OF_FILES: dict[str, Mutation] = {
    "without": _without,
    "folder": _folder,
    "pipe": _pipe,
    "link out": _link_out,
    "endless link": _endless_link,
    "device": _device,
    "empty": _empty,
    "unreadable": _unreadable,
    "deep": _deep,
}
# Those that understand what the file says, by its suffix.
_OF_CONTENT: dict[str, dict[str, Mutation]] = {
    ".json": {"json": _json, "numbers": _numbers_in_text},
    ".jsonl": {"json": _json, "numbers": _numbers_in_text, "order": _json_lines_out_of_order},
    ".yaml": {"yaml": _yaml, "numbers": _numbers_in_text},
    ".safetensors": {"header": _safetensors_header},
}


def choose(path: Path, random: Random) -> tuple[str, Mutation]:
    """A mutation that suits the file, and its name: of its content, of its bytes, of the file itself."""
    kinds = [_OF_BYTES, _OF_FILES]
    if of_content := _OF_CONTENT.get(path.suffix):
        kinds += [of_content, of_content]
    kind = random.choice(kinds)
    name = random.choice(sorted(kind))
    return name, kind[name]
