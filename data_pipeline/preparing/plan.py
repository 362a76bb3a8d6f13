"""What a corpus folder is being prepared from and with, written down first, so that nothing else is mixed into it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from conf.stored_values import fits
from data_pipeline.corpus.files import path_in, write_whole
from data_pipeline.corpus.input_list import read_input_lines
from data_pipeline.corpus.manifest import MANIFEST_FILE, Manifest, canonical_json
from data_pipeline.errors import PrepareError
from data_pipeline.preparing.claims import Claims
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.workers import WorkFolder
from data_pipeline.sources.config import MAX_READER_BYTES
from data_pipeline.sources.source import InputFile
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.tokenizer import load_tokenizer


def content_settings(config: PrepareConfig) -> dict[str, Any]:
    """What the corpus' content depends on beside the input; no absolute path, so that a moved source is the same."""
    data = dataclasses.asdict(config.data)
    del data["tolerance"]
    if config.data.max_reader_bytes == MAX_READER_BYTES:
        # Corpora that were prepared before there was the key keep their settings.
        del data["max_reader_bytes"]
    if config.data.kind != "datasets" or config.data.path is None or Path(config.data.path).exists():
        del data["path"]
    if config.tokenizer.kind == "file":
        loaded = load_tokenizer(config.tokenizer)
        tokenizer = {"kind": "file", "fingerprint": loaded.fingerprint}
    else:
        tokenizer = dataclasses.asdict(config.tokenizer)
        del tokenizer["backend"]
    sizes = {"shard_bytes": config.shard_bytes, "unit_bytes": config.unit_bytes}
    return {"data": data, "tokenizer": tokenizer, **sizes}


def confirm_finished(config: PrepareConfig, folder: Path, manifest: Manifest) -> None:
    """Raises PrepareError when the finished corpus in `folder` was prepared with other settings or from other files."""
    _refuse_other_settings(folder, manifest.settings, content_settings(config))
    if config.data.kind == "datasets" or config.data.path and not Path(config.data.path).exists():
        return
    lines = read_input_lines(path_in(folder, manifest.inputs.file, MANIFEST_FILE, "inputs.file"))
    old = {entry["file"]: entry["bytes"] for entry in lines}
    _refuse_other_inputs(folder, old, open_source(config.data).inputs())


def refuse_strangers(folder: Path) -> None:
    """Raises PrepareError when a folder without a plan holds something that is not a preparation's."""
    work = WorkFolder(folder)
    # Listed before the plan is looked for: a command that begins writes its plan before anything else.
    strangers = sorted(p.name for p in folder.iterdir() if p != work.path and p.suffix != ".partial")
    if strangers and not work.plan.exists():
        raise PrepareError(f"{folder}: not empty (it holds {strangers[0]}) and not a corpus; choose another output")


def refuse_output_at_source(config: PrepareConfig) -> None:
    """Raises PrepareError where the corpus would lie in the folder of the input, be it, or hold it."""
    if config.data.path is None or not os.path.isdir(config.data.path):
        return
    output, path = (Path(os.path.realpath(name)) for name in (config.output, config.data.path))
    if output == path or path in output.parents or output in path.parents:
        how = "is" if output == path else "lies in" if path in output.parents else "holds"
        raise PrepareError(
            f"output: {config.output} {how} the folder of the input, data.path={config.data.path}; choose an output "
            "elsewhere"
        )


def begin_preparation(
    config: PrepareConfig, folder: Path, inputs: list[InputFile], units: list[list[InputFile]], claims: Claims
) -> bool:
    """Record what is being prepared, or compare with what was; returns whether the folder had been begun.

    Raises PrepareError for other settings or other input files.
    """
    work = WorkFolder(folder)
    work.create()
    settings = content_settings(config)
    files = [[item.name, item.bytes] for item in inputs]
    # What is cut where depends on what the files hold, which their sizes do not tell.
    parts = [[item.name, item.part.first, item.part.end] for unit in units for item in unit if item.part]
    text = canonical_json({"settings": settings, "inputs": files, "parts": parts})
    while not work.plan.exists():
        with claims.take("plan") as mine:
            if mine and not work.plan.exists():
                write_whole(work.plan, text.encode())
                return False
        if not mine:
            time.sleep(0.1)
    plan = _read_plan(work.plan)
    _refuse_other_settings(folder, plan["settings"], settings)
    _refuse_other_inputs(folder, dict(plan["inputs"]), inputs)
    planned = plan["parts"]
    if parts != planned:
        name = next(iter(next(a or b for a, b in itertools.zip_longest(parts, planned) if a != b)), "a file")
        raise PrepareError(
            f"{folder}: {name} had other row groups when the preparation was begun; delete the folder and begin "
            "again, or restore the file"
        )
    return True


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        # To open a pipe would wait for ever.
        plan = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        plan = None
    if isinstance(plan, dict):
        # Earlier versions knew no parts.
        plan = {"parts": [], **plan}
        kinds = {"settings": dict[str, Any], "inputs": list[list[Any]], "parts": list[list[Any]]}
        if all(fits(plan.get(key), kind) for key, kind in kinds.items()) and all(
            len(item) == 2 and isinstance(item[0], str) for item in plan["inputs"]
        ):
            return plan
    raise PrepareError(
        f"{path}: damaged, so that nobody can tell what was being prepared; delete {path.parent.parent} and begin "
        "again, or restore the file"
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _refuse_other_settings(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = _flatten(old), _flatten(new)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in changed)
        raise PrepareError(
            f"{folder}: was prepared with other settings:\n{lines}\nUse these settings, another output, or delete it"
        )


def _refuse_other_inputs(folder: Path, old: dict[str, int], inputs: list[InputFile]) -> None:
    new = {item.name: item.bytes for item in inputs}
    lines = [f"  {name}: new" for name in new if name not in old]
    lines += [f"  {name}: gone" for name in old if name not in new]
    lines += [
        f"  {name}: {old[name]} bytes there, {new[name]} now" for name in new if old.get(name, new[name]) != new[name]
    ]
    if lines:
        shown = "\n".join(lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []))
        raise PrepareError(f"{folder}: was prepared from other input files:\n{shown}\nUse another output, or delete it")
