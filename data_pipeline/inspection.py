"""Looking into a corpus: statistics, a sample of a run with its origin, and a check of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipeline.corpus import Corpus, check_shard_file
from data_pipeline.errors import CorpusError
from data_pipeline.manifest import Manifest

SAMPLE_TOKENS = 200
LENGTH_QUANTILES = (0.05, 0.5, 0.95, 1.0)


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
    print()
    print(
        f"{'split':<12}{'source':<28}{'shards':>7}{'documents':>12}{'tokens':>16}{'bytes/token':>12}  document length"
    )
    for split in corpus.splits:
        for source in corpus.sources(split):
            _show_source(corpus, split, source)
    for split in corpus.splits:
        sequence = corpus.sequence(split, corpus.sources(split)[0])
        shard = sequence.shard(0)
        ids = shard.tokens[: min(SAMPLE_TOKENS, int(shard.offsets[1]))]
        print(f"\n{split}, beginning of the first document of {corpus.sources(split)[0]}:")
        print(_indented(corpus.tokenizer().decode(ids)))


def _show_source(corpus: Corpus, split: str, source: str) -> None:
    sums = corpus.manifest.splits[split][source]
    sequence = corpus.sequence(split, source)
    lengths = np.concatenate([np.diff(sequence.shard(n).offsets) for n in range(len(sequence.entries))])
    quantiles = "/".join(f"{int(q)}" for q in np.quantile(lengths, LENGTH_QUANTILES, method="lower"))
    print(
        f"{split:<12}{source:<28}{len(sequence.entries):>7,}{sums['documents']:>12,}{sums['tokens']:>16,}"
        f"{sums['text_bytes'] / sums['tokens']:>12.2f}  {quantiles} tokens (5 %/median/95 %/longest)"
    )


def show_sample(
    directory: Path, split: str, sequence_length: int, seed: int, weights: Mapping[str, float] | None, index: int
) -> None:
    """Print sample `index` of a run: source, epoch, shard and token range, document starts, text."""
    from data_pipeline.mixture import MixtureConfig
    from data_pipeline.stream import SampleStream

    corpus = Corpus.open(directory)
    stream = SampleStream(corpus, split, sequence_length, seed, MixtureConfig(weights))
    origin = stream.origin(index)
    batch = stream.batch(index, 1)
    print(f"sample {index} of the order {stream.fingerprint[:16]} (split {split}, seed {seed}, S={sequence_length})")
    print(f"source {origin.source}, epoch {origin.epoch}, sample {origin.sample} of it")
    for file, first, end in origin.parts:
        print(f"  {file}: tokens {first} to {end - 1}")
    starts = batch.document_start[0].nonzero().flatten().tolist()
    print(f"documents start at positions {starts}")
    print(_indented(corpus.tokenizer().decode(batch.tokens[0].tolist())))


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def verify_corpus(directory: Path) -> list[str]:
    """Every fault of a corpus, one line each with the file: checksums, structure, lists and tokenizer."""
    manifest = Manifest.read(directory)
    corpus = Corpus(directory, manifest)
    problems = []
    try:
        corpus.tokenizer()
    except CorpusError as error:
        problems.append(str(error))
    for entry in (manifest.inputs, manifest.report):
        path = directory / entry.file
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
            problems.append(f"{path}: altered after it was written (sha256 differs)")
    for entry in manifest.shards:
        path = directory / entry.file
        problem = check_shard_file(directory, entry, with_hash=True, with_sha256=True)
        if problem:
            problems.append(f"{path}: {problem}")
            continue
        sequence = corpus.sequence(entry.split, entry.source)
        try:
            shard = sequence.shard(sequence.entries.index(entry))
        except CorpusError as error:
            problems.append(str(error))
            continue
        problems += [f"{path}: {fault}" for fault in shard.problems(corpus.vocab_size, corpus.eod_id)]
    return problems
