"""Looking into a corpus: statistics, and a check of every file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.corpus.corpus import Corpus, check_shard_file
from data_pipeline.corpus.files import hash_file, path_in
from data_pipeline.corpus.input_list import count_files, read_input_lines
from data_pipeline.corpus.manifest import MANIFEST_FILE, InputsEntry, Manifest, ReportEntry
from data_pipeline.corpus.shard_table import ShardEntry, shard_path
from data_pipeline.corpus.token_sequence import open_shard
from data_pipeline.errors import CorpusError, TokenizerError
from data_pipeline.tokenizing.tokenizer import SIDECAR, Tokenizer

SAMPLE_TOKENS = 200
LENGTH_QUANTILES = (0.05, 0.5, 0.95, 1.0)
# Shards of a source, spread evenly over it, whose document lengths and text hashes are looked at.
STATISTICS_SHARDS = 64


def show_corpus(directory: Path) -> None:
    """Print what a corpus holds, and the beginning of a document of each split. Raises CorpusError."""
    corpus = Corpus.open(directory)
    tokenizer = corpus.manifest.tokenizer
    print(f"corpus       {directory}")
    print(f"fingerprint  {corpus.fingerprint}")
    print(
        f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} ids ({corpus.manifest.token_dtype}), documents end "
        f"with {tokenizer.eod_token} (id {tokenizer.eod_id}), fingerprint {tokenizer.fingerprint[:16]}"
    )
    inputs = corpus.manifest.inputs
    print(
        f"input        {inputs.files:,} files, {inputs.records:,} records = {inputs.documents:,} documents + "
        f"{sum(inputs.rejected.values()):,} rejected {inputs.rejected or ''}"
    )
    if inputs.repaired:
        print(f"repaired     {inputs.repaired}")
    if inputs.lost:
        print(f"lost text    {inputs.lost['bytes']:,} bytes in {inputs.lost['documents']:,} documents have no token")
    print()
    print(
        f"{'split':<12}{'source':<28}{'shards':>7}{'documents':>12}{'tokens':>16}{'share':>7}{'bytes/token':>12}"
        "  document length"
    )
    for split in corpus.splits:
        for source in corpus.sources(split):
            _show_source(corpus, split, source)
    for split in corpus.splits:
        sequence = corpus.sequence(split, corpus.sources(split)[0])
        shard = sequence.shard(0)
        ids = shard.tokens[: min(SAMPLE_TOKENS, int(shard.offsets[1]))]
        print(f"\n{split}, beginning of the first document of {corpus.sources(split)[0]}:")
        print(indented(corpus.tokenizer().decode(ids.tolist())))


def _show_source(corpus: Corpus, split: str, source: str) -> None:
    sums = corpus.manifest.splits[split][source]
    total = sum(entry["tokens"] for entry in corpus.manifest.splits[split].values())
    table = corpus.manifest.shards
    rows = table.rows(split, source)
    looked_at = rows[np.unique(np.linspace(0, len(rows) - 1, STATISTICS_SHARDS).astype(int))]
    shards = [open_shard(shard_path(corpus.folder, table.file(row)), table[row], corpus.manifest) for row in looked_at]
    lengths = np.concatenate([np.diff(shard.offsets) for shard in shards])
    hashes = np.concatenate([shard.document_hashes for shard in shards])
    quantiles = "/".join(f"{int(q)}" for q in np.quantile(lengths, LENGTH_QUANTILES, method="lower"))
    part = "" if len(looked_at) == len(rows) else f" in {len(looked_at)} shards"
    print(
        f"{split:<12}{source:<28}{len(rows):>7,}{sums['documents']:>12,}{sums['tokens']:>16,}"
        f"{sums['tokens'] / total:>7.1%}{sums['text_bytes'] / sums['tokens']:>12.2f}  {quantiles} tokens "
        f"(5 %/median/95 %/longest), "
        f"{len(hashes) - len(np.unique(hashes)):,} repeated texts{part}"
    )


def indented(text: str) -> str:
    """`text` as a block of lines below others."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def verify_corpus(directory: Path, threads: int = 1) -> list[str]:
    """Every fault of a corpus, one line each with the file: checksums, structure, lists, accounts and tokenizer.

    `threads`: shards checked at a time. Raises CorpusError for a manifest that cannot be read.
    """
    manifest = Manifest.read(directory)
    corpus = Corpus(directory, manifest)
    problems = []
    try:
        corpus.tokenizer()
        # Reading a corpus does without this file; another preparation may take its tokenizer from here.
        sidecar = path_in(directory, manifest.tokenizer.file, MANIFEST_FILE, "tokenizer.file").with_name(SIDECAR)
        if not sidecar.is_file():
            problems.append(f"{sidecar}: missing")
        elif (found := Tokenizer.load(sidecar.parent).eod_token) != manifest.tokenizer.eod_token:
            problems.append(f"{sidecar}: altered: it names {found}, the manifest {manifest.tokenizer.eod_token}")
    except (CorpusError, TokenizerError) as error:
        problems.append(str(error))
    of_inputs = _list_faults(directory, "inputs", manifest.inputs)
    problems += of_inputs + _list_faults(directory, "report", manifest.report)
    if not of_inputs:
        problems += _account_faults(directory, manifest)
    problems += _shard_list_faults(directory, manifest)
    with ThreadPoolExecutor(threads) as pool:
        for faults in pool.map(lambda entry: _shard_faults(corpus, entry), manifest.shards):
            problems += faults
    return problems


def _list_faults(directory: Path, name: str, entry: InputsEntry | ReportEntry) -> list[str]:
    """What is wrong with the file of inputs.jsonl or report.jsonl."""
    path = path_in(directory, entry.file, MANIFEST_FILE, f"{name}.file")
    if not path.is_file():
        return [f"{path}: missing"]
    if hash_file(path).sha256 != entry.sha256:
        return [f"{path}: altered after it was written (sha256 differs)"]
    return []


def _account_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Records that are neither written nor rejected, file by file, unit by unit and in all."""
    path = path_in(directory, manifest.inputs.file, MANIFEST_FILE, "inputs.file")
    try:
        files = read_input_lines(path)
    except CorpusError as error:
        return [str(error)]
    faults = []
    for entry in files:
        rejected = sum(entry["rejected"].values())
        if entry["records"] != entry["documents"] + rejected:
            faults.append(
                f"{path}: {entry['file']}: {entry['records']} records are not {entry['documents']} documents + "
                f"{rejected} rejected"
            )
    sums = {key: sum(entry[key] for entry in files) for key in ("records", "documents")}
    stated = {key: getattr(manifest.inputs, key) for key in sums}
    if (sums, count_files(files)) != (stated, manifest.inputs.files):
        faults.append(
            f"{path}: {count_files(files)} files with {sums}, the manifest says {manifest.inputs.files} with {stated}"
        )
    read: dict[int, int] = {}
    for entry in files:
        read[entry["unit"]] = read.get(entry["unit"], 0) + entry["documents"]
    written: dict[int, int] = {}
    for shard in manifest.shards:
        written[shard.unit] = written.get(shard.unit, 0) + shard.documents
    # A part of a corpus keeps the lists of the whole; units of merged corpora share numbers.
    if not {"part_of", "merged"} & set(manifest.settings):
        faults += [
            f"{directory}: unit {unit}: {read.get(unit, 0)} documents read, {written.get(unit, 0)} in its shards"
            for unit in sorted({*read, *written})
            if read.get(unit, 0) != written.get(unit, 0)
        ]
    elif sum(written.values()) > sums["documents"]:
        faults.append(f"{directory}: {sum(written.values())} documents in the shards, {sums['documents']} were read")
    return faults


def _shard_list_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Shards listed twice, and files among the shards that are not listed."""
    faults = []
    names: set[str] = set()
    hashes: dict[str, str] = {}
    for entry in manifest.shards:
        if entry.file in names:
            faults.append(f"{directory / entry.file}: listed twice in the manifest")
        elif entry.sha256 in hashes:
            faults.append(f"{directory / entry.file}: the same content as {hashes[entry.sha256]}")
        names.add(entry.file)
        hashes.setdefault(entry.sha256, entry.file)
    for path in sorted((directory / "shards").rglob("*")):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in names:
            faults.append(f"{path}: not listed in the manifest; it belongs to another corpus, or remained of a kill")
    return faults


def _shard_faults(corpus: Corpus, entry: ShardEntry) -> list[str]:
    try:
        path = shard_path(corpus.folder, entry.file)
    except CorpusError as error:
        return [str(error)]
    problem = check_shard_file(corpus.folder, entry, with_hash=True, with_sha256=True)
    if problem:
        return [f"{path}: {problem}"]
    try:
        shard = open_shard(path, entry, corpus.manifest)
    except CorpusError as error:
        return [str(error)]
    faults = shard.problems(corpus.vocab_size, corpus.eod_id)
    if int(shard.text_bytes.sum(dtype=np.int64)) != entry.text_bytes:
        faults.append(
            f"{int(shard.text_bytes.sum(dtype=np.int64))} bytes of text, the manifest says {entry.text_bytes}"
        )
    return [f"{path}: {fault}" for fault in faults]
