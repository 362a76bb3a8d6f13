"""Best-fit packing: which pieces of documents make up a sample, without cutting a document that fits into one.

Documents are taken in blocks of at least BLOCK_TOKENS, in the order of the source. In a block, a document longer than a
sample gives whole samples and a rest; rests and shorter documents are packed by best fit, longest first. So a block's
samples depend on its documents alone, packing needs the memory of one block, and the result does not depend on who
computes it. It is kept as a plan on disk (8 bytes a piece, below 1 % of the tokens), of which a reader holds nothing:

    plan.json   version, corpus, split, sequence length; of each source: samples, pieces, statistics; checksums
    samples     int64 [samples + 1] for each source: number of its first piece, and the number of pieces
    pieces      uint64 [pieces] for each source: first token << 24 | tokens << 1 | whether a document begins there

A document of n tokens, its end-of-document id included, fills n places: the end-of-document id as the first input, and
its n tokens as targets. What is left of a sample is padding, whose targets are masked.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.corpus.blocks import as_bytes, check_block, read_exactly
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.files import BLOCK_BYTES, hash_file, path_in, write_whole
from data_pipeline.corpus.manifest import canonical_json, fingerprint_of
from data_pipeline.corpus.token_sequence import TokenSequence
from data_pipeline.errors import CorpusError

PACKING_VERSION = 1
BLOCK_TOKENS = 1 << 22
MAX_SEQUENCE_LENGTH = (1 << 23) - 1
_PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class PackingStatistics:
    """What packing does to one source. Places: samples * sequence_length.

    cut: documents of which a sample holds only a part. cut_though_fitting: those of them that are no longer than a
    sample; both for best fit, and (`concatenated_...`) for concatenation.
    """

    documents: int
    tokens: int
    samples: int
    padding: int
    cut: int
    concatenated_samples: int
    concatenated_cut: int
    concatenated_cut_though_fitting: int

    @property
    def padding_share(self) -> float:
        return self.padding / max(1, self.padding + self.tokens)


class PackingPlan:
    """The plan of one split and sequence length, opened for reading. `open_packing_plan` makes or opens it."""

    def __init__(self, folder: Path, document: dict[str, Any]):
        self.folder = folder
        self.fingerprint: str = document["fingerprint"]
        self.statistics = {s: PackingStatistics(**e["statistics"]) for s, e in document["sources"].items()}
        self._entries = document["sources"]
        self._paths: dict[str, Path] = {}
        self._descriptors: dict[str, int] = {}
        self._checked: dict[str, np.ndarray] = {}
        for source, entry in self._entries.items():
            for kind in ("samples", "pieces"):
                self._open_file(source, kind, entry[kind])

    def _open_file(self, source: str, kind: str, entry: dict[str, Any]) -> None:
        path = path_in(self.folder, entry["file"], _PLAN_FILE, f"sources.{source}.{kind}.file")
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CorpusError(f"{path}: missing or of another size than planned; delete {self.folder} to plan again")
        self._paths[f"{source}/{kind}"] = path
        self._descriptors[f"{source}/{kind}"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._checked[f"{source}/{kind}"] = np.zeros(len(entry["xxh3_64_blocks"]), dtype=bool)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def samples(self, source: str) -> int:
        return self.statistics[source].samples

    def pieces(self, source: str, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """(row, column, begin, count, is a document's beginning) of every piece of `samples` (int64 [n]) of a source.

        row: number in `samples`; column: place in the sample; begin: token of the source; int64, the last bool.
        """
        columns = []
        for row, sample in enumerate(samples.tolist()):
            first, end = self._read(source, "samples", sample, 2, np.int64).tolist()
            found = self._read(source, "pieces", first, end - first, np.uint64)
            counts = ((found >> np.uint64(1)) & np.uint64(MAX_SEQUENCE_LENGTH)).astype(np.int64)
            begins = (found >> np.uint64(24)).astype(np.int64)
            places = np.cumsum(counts) - counts
            columns.append((np.full(len(found), row), places, begins, counts, (found & np.uint64(1)).astype(bool)))
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))

    def _read(self, source: str, kind: str, first: int, count: int, dtype: type[np.generic]) -> np.ndarray:
        entry, key = self._entries[source][kind], f"{source}/{kind}"
        path, descriptor, checked = self._paths[key], self._descriptors[key], self._checked[key]
        values = np.empty(count, dtype=dtype)
        for block in range(8 * first // BLOCK_BYTES, (8 * (first + count) - 1) // BLOCK_BYTES + 1):
            if not checked[block]:
                digests = bytes.fromhex("".join(entry["xxh3_64_blocks"]))
                advice = f"delete {self.folder} to plan again"
                check_block(path, descriptor, block, BLOCK_BYTES, entry["bytes"], digests, advice)
                checked[block] = True
        read_exactly(path, descriptor, as_bytes(values), 8 * first)
        return values


def open_packing_plan(corpus: Corpus, split: str, sequence_length: int, folder: Path | None = None) -> PackingPlan:
    """The plan for packing `split` into samples of `sequence_length`, computed and kept if it does not exist yet.

    `folder`: where plans are kept; None: `packing/` in the corpus folder. One process plans, others wait for it. Raises
    CorpusError for a folder that cannot be written and for a damaged plan.
    """
    if not 1 <= sequence_length <= MAX_SEQUENCE_LENGTH:
        raise ValueError(f"sequence_length must be between 1 and {MAX_SEQUENCE_LENGTH}, got {sequence_length}")
    identity = {"version": PACKING_VERSION, "corpus": corpus.fingerprint, "split": split}
    identity |= {"sequence_length": sequence_length, "block_tokens": BLOCK_TOKENS}
    name = f"{split}-{sequence_length}-{fingerprint_of(identity)[:16]}"
    root = Path(folder) if folder else corpus.folder / "packing"
    target = root / name
    try:
        if not (target / _PLAN_FILE).exists():
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (target / _PLAN_FILE).exists():
                    _write_packing_plan(corpus, split, sequence_length, identity, target)
    except OSError as error:
        raise CorpusError(
            f"{target}: the packing plan cannot be written ({error.strerror}); set corpus.packing_directory to a "
            "folder that can"
        ) from None
    return PackingPlan(target, _read_packing_plan(target, identity))


def _read_packing_plan(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    path = folder / _PLAN_FILE
    try:
        document = json.loads(path.read_bytes())
        signed = {key: value for key, value in document.items() if key != "fingerprint"}
        intact = document["fingerprint"] == fingerprint_of(signed)
    except (ValueError, KeyError, AttributeError):
        intact = False
    if not intact or document["identity"] != identity:
        raise CorpusError(f"{path}: altered after it was written; delete {folder} to plan again")
    return document


def _write_packing_plan(corpus: Corpus, split: str, length: int, identity: dict[str, Any], target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    sources = {}
    for number, source in enumerate(corpus.sources(split)):
        paths = {kind: partial / f"{number:03d}.{kind}" for kind in ("samples", "pieces")}
        statistics = _plan_source(corpus.sequence(split, source), length, paths)
        sources[source] = {"statistics": dataclasses.asdict(statistics)}
        for kind, path in paths.items():
            found = hash_file(path, with_sha256=False)
            entry = {"file": path.name, "bytes": found.bytes, "xxh3_64_blocks": found.xxh3_64_blocks}
            sources[source][kind] = entry
    document: dict[str, Any] = {"identity": identity, "block_bytes": BLOCK_BYTES, "sources": sources}
    document["fingerprint"] = fingerprint_of(document)
    write_whole(partial / _PLAN_FILE, canonical_json(document).encode())
    partial.rename(target)


def _plan_source(sequence: TokenSequence, length: int, paths: dict[str, Path]) -> PackingStatistics:
    sums = dict.fromkeys((field.name for field in dataclasses.fields(PackingStatistics)), 0)
    written = 0
    with open(paths["samples"], "wb") as samples, open(paths["pieces"], "wb") as pieces:
        np.zeros(1, np.int64).tofile(samples)
        for ends in document_blocks(sequence):
            begins = np.concatenate((ends[:1], ends[:-1]))[1:]
            ends = ends[1:]
            packed, ranges = pack_block(begins, ends, length)
            packed.tofile(pieces)
            (ranges + written).tofile(samples)
            written += len(packed)
            sizes = ends - begins
            cut = begins // length != (ends - 1) // length
            sums["documents"] += len(sizes)
            sums["tokens"] += int(sizes.sum())
            sums["samples"] += len(ranges)
            sums["cut"] += int((sizes > length).sum())
            sums["concatenated_cut"] += int(cut.sum())
            sums["concatenated_cut_though_fitting"] += int((cut & (sizes <= length)).sum())
        for file in (samples, pieces):
            file.flush()
            os.fsync(file.fileno())
    sums["padding"] = sums["samples"] * length - sums["tokens"]
    sums["concatenated_samples"] = max(0, (sums["tokens"] - 1) // length)
    return PackingStatistics(**sums)


def document_blocks(sequence: TokenSequence) -> Iterator[np.ndarray]:
    """Blocks of consecutive documents as int64 [documents + 1]: the places in the source where they begin and end."""
    waiting: list[np.ndarray] = []
    begin = 0
    for number in range(sequence.shards):
        offsets = sequence.document_offsets(number)
        # Cut where a block is full; a shard may hold many blocks, or a part of one.
        while offsets[-1] - begin >= BLOCK_TOKENS:
            cut = int(np.searchsorted(offsets, begin + BLOCK_TOKENS))
            waiting.append(offsets[1 : cut + 1])
            yield np.concatenate(([begin], *waiting))
            waiting, begin, offsets = [], int(offsets[cut]), offsets[cut:]
        waiting.append(offsets[1:])
    if any(len(part) for part in waiting):
        yield np.concatenate(([begin], *waiting))


def pack_block(begins: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces, end of each sample's pieces) of the documents [begins, ends), int64 [n], as in the plan's files."""
    whole = (ends - begins) // length
    # Whole samples of long documents.
    number = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole) - whole, whole)
    whole_begins = np.repeat(begins, whole) + number * length
    full = _encode(whole_begins, np.full(len(number), length), number == 0)
    # What is left of them, and the documents that are shorter than a sample.
    rest = (ends - begins) % length
    order = np.argsort(-rest, kind="stable")[: int((rest > 0).sum())]
    bins = _best_fit(rest[order].tolist(), length)
    left_begins = (ends - rest)[order]
    left = _encode(left_begins, rest[order], left_begins == begins[order])
    by_bin = np.argsort(bins, kind="stable")
    packed = np.concatenate((full, left[by_bin]))
    counts = np.concatenate((np.ones(len(full), np.int64), np.bincount(bins) if len(bins) else np.empty(0, np.int64)))
    return packed, np.cumsum(counts, dtype=np.int64)


def _best_fit(sizes: list[int], length: int) -> np.ndarray:
    """The bin of each size, int64: the one with the least room that is enough, else a new one."""
    bins = np.empty(len(sizes), dtype=np.int64)
    # Bit r is set when a bin has room for exactly r more; the bins are on rooms[r].
    rooms: dict[int, list[int]] = {}
    mask, opened = 0, 0
    for place, size in enumerate(sizes):
        fitting = mask >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = rooms[room].pop()
            if not rooms[room]:
                mask ^= 1 << room
        else:
            room, number, opened = length, opened, opened + 1
        bins[place] = number
        if left := room - size:
            rooms.setdefault(left, []).append(number)
            mask |= 1 << left
    return bins


def _encode(begins: np.ndarray, counts: np.ndarray, is_start: np.ndarray) -> np.ndarray:
    return (begins.astype(np.uint64) << np.uint64(24)) | (counts.astype(np.uint64) << np.uint64(1)) | is_start
