"""A sample of a run shown with its origin, to trace a loss spike back to text."""

from __future__ import annotations

from data_pipeline.corpus.inspection import indented
from data_pipeline.reading.stream import SampleStream


def show_samples(stream: SampleStream, first: int, count: int) -> None:
    """Print samples first ... first + count - 1 of a run, with an empty line between two."""
    for index in range(first, first + count):
        if index > first:
            print()
        show_sample(stream, index)


def show_sample(stream: SampleStream, index: int) -> None:
    """Print sample `index` of a run: source, epoch, shard and token range, document starts, text."""
    origin = stream.origin(index)
    batch = stream.batch(index, 1)
    settings = f"split {stream.split}, seed {stream.seed}, S={stream.sequence_length}"
    if stream.window_shards is not None:
        settings += f", windows of {stream.window_shards} shards"
    print(f"sample {index} of the order {stream.fingerprint[:16]} ({settings})")
    print(f"source {origin.source}, epoch {origin.epoch}, sample {origin.sample} of it")
    for file, first, end in origin.parts:
        print(f"  {file}: tokens {first} to {end - 1}")
    starts = batch.document_start[0].nonzero().flatten().tolist()
    print(f"documents start at positions {starts}")
    print(indented(stream.corpus.tokenizer().decode(batch.tokens[0].tolist())))
