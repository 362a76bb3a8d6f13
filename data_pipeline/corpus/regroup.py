"""Corpora put together and taken apart by their manifests: no shard is rewritten, the new folders link to the files."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.corpus.blocks import RESTORE
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.files import path_in, write_whole
from data_pipeline.corpus.input_list import count_files, read_input_lines, sum_counts
from data_pipeline.corpus.manifest import MANIFEST_FILE, InputsEntry, Manifest, ReportEntry
from data_pipeline.corpus.shard_table import ShardEntry, ShardTable, shard_path
from data_pipeline.errors import CorpusError, MachineError

# How a new folder gets its shards: a second name of the same file, a reference by path, or a file of its own.
LINKS: dict[str, Callable[[Path, Path], object]] = {
    "hard": lambda source, target: os.link(source, target),
    "symbolic": lambda source, target: target.symlink_to(source.resolve()),
    "copy": lambda source, target: shutil.copyfile(source, target),
}
# What must be equal in corpora that are to be one.
_EQUAL = ("fingerprint", "kind", "vocab_size", "eod_id", "probe_sha256")


def merge_corpora(directories: list[Path], output: Path, link: str = "hard") -> Manifest:
    """Write `output`, a corpus of all shards of `directories`, in their order. Raises CorpusError.

    All must have been written by the same tokenizer, and no shard may occur twice.
    """
    corpora = [Corpus.open(directory) for directory in directories]
    first = corpora[0].manifest
    problems = []
    for corpus in corpora[1:]:
        mine = {key: getattr(corpus.manifest.tokenizer, key) for key in _EQUAL} | _layout(corpus.manifest)
        theirs = {key: getattr(first.tokenizer, key) for key in _EQUAL} | _layout(first)
        problems += [
            f"{corpus.directory}: its {key} is {mine[key]}, {corpora[0].directory} has {theirs[key]}"
            for key in mine
            if mine[key] != theirs[key] and key not in ("fingerprint", "probe_sha256")
        ]
        if any(mine[key] != theirs[key] for key in _EQUAL):
            problems.append(
                f"{corpus.directory}: prepared with another tokenizer than {corpora[0].directory}; prepare its text "
                f"again with tokenizer=file tokenizer.path={corpora[0].tokenizer().path}"
            )
    owners: dict[str, Path] = {}
    for corpus in corpora:
        for entry in corpus.manifest.shards:
            if entry.sha256 in owners:
                problems.append(f"{shard_path(corpus.folder, entry.file)}: the same shard as {owners[entry.sha256]}")
            owners[entry.sha256] = shard_path(corpus.folder, entry.file)
    if problems:
        raise CorpusError("these corpora cannot be merged:\n" + "\n".join(f"  {line}" for line in problems[:20]))
    shards = [
        (
            shard_path(corpus.folder, entry.file),
            dataclasses.replace(entry, file=f"shards/{number:04d}/{_below(entry.file)}"),
        )
        for number, corpus in enumerate(corpora)
        for entry in corpus.manifest.shards
    ]
    parts = [{"fingerprint": corpus.fingerprint, "settings": corpus.manifest.settings} for corpus in corpora]
    return _write(corpora, shards, {"merged": parts}, output, link)


def split_corpus(
    directory: Path,
    output: Path,
    splits: Iterable[str] = (),
    sources: Iterable[str] = (),
    parts: int = 1,
    link: str = "hard",
) -> list[tuple[Path, Manifest]]:
    """Write corpora with the shards of some splits and sources (none named: all) of the one in `directory`.

    With `parts` above 1 there is one in `output`-NNNNN for each, which get the shards of every source in turn. Raises
    CorpusError for labels that the corpus lacks, and when a part would be empty.
    """
    corpus = Corpus.open(directory)
    known_sources = sorted({source for sums in corpus.manifest.splits.values() for source in sums})
    for kind, wanted, known in (("split", splits, corpus.splits), ("source", sources, known_sources)):
        if missing := sorted(set(wanted) - set(known)):
            raise CorpusError(f"{directory}: no {kind} '{missing[0]}'; the corpus has {', '.join(known)}")
    chosen: list[list[ShardEntry]] = [[] for _ in range(parts)]
    turns: dict[tuple[str, str], int] = {}
    for entry in corpus.manifest.shards:
        if (not splits or entry.split in splits) and (not sources or entry.source in sources):
            turn = turns[entry.split, entry.source] = turns.get((entry.split, entry.source), -1) + 1
            chosen[turn % parts].append(entry)
    if not all(chosen):
        raise CorpusError(f"{directory}: {sum(map(len, chosen))} shards of what is asked for do not give {parts} parts")
    selection = {"splits": sorted(splits), "sources": sorted(sources), "parts": parts}
    manifests = []
    for part, entries in enumerate(chosen):
        folder = output if parts == 1 else output.with_name(f"{output.name}-{part:05d}")
        settings = {"part_of": corpus.fingerprint, **selection, "part": part, "settings": corpus.manifest.settings}
        shards = [(shard_path(corpus.folder, entry.file), entry) for entry in entries]
        manifests.append((folder, _write([corpus], shards, settings, folder, link)))
    return manifests


def _layout(manifest: Manifest) -> dict[str, Any]:
    return {"token_dtype": manifest.token_dtype, "block_bytes": manifest.block_bytes}


def _below(file: str) -> str:
    return file.removeprefix("shards/")


def _write(
    corpora: list[Corpus],
    shards: list[tuple[Path, ShardEntry]],
    settings: dict[str, Any],
    output: Path,
    link: str,
) -> Manifest:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CorpusError(f"{output}: exists already and is not an empty folder; choose another")
    for corpus in corpora:
        if Path(os.path.realpath(corpus.folder)) in Path(os.path.realpath(output)).parents:
            raise CorpusError(f"{output}: lies in the corpus {corpus.directory}; choose an output elsewhere")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        manifest = _fill(corpora, shards, settings, partial, link)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, CorpusError) as error:
        # Gives the space back where there was too little of it.
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CorpusError):
            raise
        raise MachineError(f"{output}: cannot be written ({error.strerror})") from None
    return manifest


def _fill(
    corpora: list[Corpus], shards: list[tuple[Path, ShardEntry]], settings: dict[str, Any], partial: Path, link: str
) -> Manifest:
    partial.mkdir(parents=True)
    for source, entry in shards:
        target = shard_path(partial, entry.file)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            LINKS[link](source, target)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP) and link == "hard":
                raise CorpusError(
                    f"{source}: cannot get a second name in {partial.parent} ({error.strerror}); use --link symbolic "
                    "or --link copy"
                ) from None
            raise
    first = corpora[0].manifest
    tokenizer_folder = path_in(partial, first.tokenizer.file, MANIFEST_FILE, "tokenizer.file").parent
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    corpora[0].tokenizer().save_to(tokenizer_folder)
    lists = {name: _joined(corpora, name) for name in ("inputs", "report")}
    hashes = {}
    for name, lines in lists.items():
        path = path_in(partial, getattr(first, name).file, MANIFEST_FILE, f"{name}.file")
        hashes[name] = write_whole(path, "".join(lines).encode("utf-8", "surrogateescape")).sha256
    files = read_input_lines(path_in(partial, first.inputs.file, MANIFEST_FILE, "inputs.file"))
    manifest = dataclasses.replace(
        first,
        settings=settings,
        shards=ShardTable.from_entries(entry for _, entry in shards),
        inputs=InputsEntry(
            file=first.inputs.file,
            sha256=hashes["inputs"],
            files=count_files(files),
            records=sum(entry["records"] for entry in files),
            documents=sum(entry["documents"] for entry in files),
            rejected=sum_counts(files, "rejected"),
            repaired=sum_counts(files, "repaired"),
            lost=sum_counts(files, "lost"),
        ),
        report=ReportEntry(first.report.file, hashes["report"], len(lists["report"])),
    )
    manifest.write(partial)
    return manifest


def _joined(corpora: list[Corpus], name: str) -> list[str]:
    """Lines of inputs.jsonl or report.jsonl of all corpora; parts of one corpus have the same ones, counted once."""
    lines: list[str] = []
    seen: set[str] = set()
    for corpus in corpora:
        origin: str = corpus.fingerprint
        settings: Any = corpus.manifest.settings
        while isinstance(settings, dict) and isinstance(settings.get("part_of"), str):
            # A part may have been taken from a part.
            origin, settings = settings["part_of"], settings.get("settings")
        if origin not in seen:
            entry = getattr(corpus.manifest, name)
            path = path_in(corpus.folder, entry.file, MANIFEST_FILE, f"{name}.file")
            if not path.is_file() or hashlib.sha256(data := path.read_bytes()).hexdigest() != entry.sha256:
                raise CorpusError(f"{path}: missing, or altered after it was written; {RESTORE}")
            if name == "inputs":
                read_input_lines(path)
            lines += data.decode("utf-8", "surrogateescape").splitlines(keepends=True)
        seen.add(origin)
    return lines
