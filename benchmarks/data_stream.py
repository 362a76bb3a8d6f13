"""How fast are samples read in a global random order, against MosaicML streaming and a NumPy memory map?

    python benchmarks/data_stream.py WORK --mds-python /tmp/mds/bin/python --output benchmarks/results/NAME.md

WORK gets a generated corpus (--tokens uint16 ids, documents of log-normal length, median 545), the same samples as MDS
shards and as one flat file. --mds-python is an interpreter with mosaicml-streaming (in an environment of its own: it
pins other versions); without it that peer is left out. Every reader runs alone in a fresh process, --rounds times in
turn. Rates are per CPU-second of the whole process, all threads, so that other jobs on the machine matter less;
wall-clock is given for the cold reads, before which the files are dropped from the page cache.

What a reader yields: int64 batches [64, 2048] of tokens and of targets, in a random order over the whole corpus; ours
also the document starts and the source labels, every block of every shard compared with its checksum on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LENGTH = 2048
BATCH = 64
VOCAB_SIZE = 50_277
SHARD_TOKENS = 16_000_000
# SlimPajama's sources and their shares of the tokens, in thousandths.
SOURCES = {"arxiv": 46, "book": 42, "c4": 267, "commoncrawl": 522, "github": 52, "stackexchange": 33, "wikipedia": 38}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=256_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mds-python", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.work, options.cold)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    make_corpus(options.work, options.tokens)
    make_large_manifest(options.work)
    readers = {"ours": sys.executable, "ours, 1 in 128 offsets in memory": sys.executable, "memmap": sys.executable}
    if options.mds_python:
        readers["mosaicml"] = str(options.mds_python)
        run_child(options, readers["mosaicml"], "make_mds")
    results: dict[str, list[dict[str, Any]]] = {}
    for round_number in range(options.rounds):
        for name, python in readers.items():
            for cold in (True, False):
                key = f"{name} cold" if cold else name
                if cold and round_number:
                    continue
                results.setdefault(key, []).append(run_child(options, python, name, cold))
                print(key, results[key][-1], flush=True)
    for name in ("start", "start at 90 % of an epoch", "a million shards"):
        results[name] = [run_child(options, sys.executable, name) for _ in range(options.rounds)]
        print(name, results[name], flush=True)
    text = report(options, results)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def run_child(options: argparse.Namespace, python: str, name: str, cold: bool = False) -> dict[str, Any]:
    if cold:
        drop_from_page_cache(options.work)
    command = [python, __file__, str(options.work), "--child", name, *(["--cold"] if cold else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def make_corpus(work: Path, tokens: int) -> None:
    """A corpus of shards and the same tokens as one flat file; left alone when it is there already."""
    from data_pipeline.corpus.manifest import Manifest
    from data_pipeline.corpus.shard_table import ShardEntry, ShardTable
    from data_pipeline.corpus.shards import Shard, ShardBuilder
    from data_pipeline.corpus.token_sequence import shard_metadata

    folder = work / "corpus"
    if (folder / "manifest.json").exists() and sum(Manifest.read(folder).shards.tokens) >= tokens:
        return
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries = []
    (work / "flat.bin").unlink(missing_ok=True)
    while sum(entry.tokens for entry in entries) < tokens:
        builder = ShardBuilder(VOCAB_SIZE, 0)
        while builder.tokens < SHARD_TOKENS:
            builder.add(rng.integers(1, VOCAB_SIZE, int(min(200_000, rng.lognormal(6.3, 1.2))) + 1), b"text")
        number = len(entries)
        entry = ShardEntry(f"shards/{number:05d}.arrow", "train", "web", number, 0, 0, 0, 0, "", "", [])
        counts = {"documents": builder.documents, "tokens": builder.tokens, "text_bytes": builder.text_bytes}
        hashes = builder.write(folder / entry.file, shard_metadata(entry, "benchmark"))
        entries.append(dataclasses.replace(entry, **counts, **dataclasses.asdict(hashes)))
        with open(work / "flat.bin", "ab") as flat:
            Shard(folder / entry.file).tokens.tofile(flat)
    manifest(ShardTable.from_entries(entries)).write(folder)


def manifest(table):
    from data_pipeline.corpus.files import BLOCK_BYTES
    from data_pipeline.corpus.manifest import InputsEntry, Manifest, ReportEntry, TokenizerEntry

    tokenizer = TokenizerEntry("t", "sentencepiece", "", "benchmark", "", "", VOCAB_SIZE, 0, "", "")
    inputs, lines = InputsEntry("inputs.jsonl", "", 1, 1, 1, {}, {}), ReportEntry("report.jsonl", "", 0)
    return Manifest({}, tokenizer, "uint16", BLOCK_BYTES, table, inputs, lines)


def make_large_manifest(work: Path) -> None:
    """A manifest of 627 billion tokens and 600 million documents in a million shards, without the shards."""
    import pyarrow as pa

    from data_pipeline.corpus.shard_table import SCHEMA, ShardTable

    count = 1_000_000
    folder = work / "large"
    if (folder / "manifest.json").exists():
        return
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    labels = list(SOURCES)
    source = np.repeat(np.arange(len(labels)), [share * 1000 for share in SOURCES.values()]).astype(np.int32)
    train = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["train"]))
    numbers = [np.arange(count), *(np.full(count, n, np.int64) for n in (600, 627_000, 2_570_000, 1_261_000))]
    columns = [
        pa.array([f"shards/train/{labels[s]}-{n:06d}-000000.arrow" for n, s in enumerate(source.tolist())]),
        train,
        pa.DictionaryArray.from_arrays(pa.array(source), pa.array(labels)),
        *(pa.array(column, pa.int64()) for column in numbers),
        *(pa.array([rng.bytes(n) for _ in range(count)], pa.binary(n)) for n in (32, 16)),
        pa.array([rng.bytes(8) for _ in range(count)], pa.binary()),
    ]
    manifest(ShardTable.from_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))).write(folder)


def measure(batches: Callable[[], Iterator[Any]], samples: int) -> dict[str, Any]:
    """Read `samples`, once a first batch was; resident memory at a tenth of them and at the end."""
    memory: list[float] = []
    iterator = batches()
    next(iterator)
    samples -= BATCH
    wall, cpu = time.perf_counter(), time.process_time()
    seen = 0
    for _ in iterator:
        seen += BATCH
        if len(memory) == 0 and seen * 10 > samples or seen >= samples:
            memory.append(resident_mib())
        if seen >= samples:
            break
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens_per_cpu_second": seen * LENGTH / cpu,
        "samples_per_cpu_second": seen / cpu,
        "tokens_per_second": seen * LENGTH / wall,
        "rss_mib": [memory[0], memory[-1]],
    }


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def open_ours(work: Path):
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.corpus.manifest import Manifest
    from data_pipeline.reading.stream import SampleStream

    return SampleStream(Corpus(work / "corpus", Manifest.read(work / "corpus")), "train", LENGTH, seed=0)


def read_ours(work: Path, cold: bool) -> dict[str, Any]:
    stream = open_ours(work)
    epoch = stream.samples_per_epoch // BATCH * BATCH
    if not cold:
        # Every block is compared with its checksum, once; `cold` counts that.
        for first in range(0, epoch, BATCH):
            stream.batch(first, BATCH)
    return measure(lambda: (stream.batch(first, BATCH) for first in range(0, epoch, BATCH)), epoch)


def read_ours_sparse(work: Path, cold: bool) -> dict[str, Any]:
    from data_pipeline.corpus import token_sequence

    # As for a source of more than INDEXED_DOCUMENTS documents.
    token_sequence.INDEXED_DOCUMENTS = 0
    return read_ours(work, cold)


def read_memmap(work: Path, cold: bool) -> dict[str, Any]:
    import torch

    tokens = np.memmap(work / "flat.bin", dtype=np.uint16, mode="r")
    samples = (len(tokens) - 1) // LENGTH
    order = np.random.default_rng(0).permutation(samples)

    def batches() -> Iterator[Any]:
        fetched = np.empty((BATCH, LENGTH + 1), np.uint16)
        for first in range(0, samples - BATCH, BATCH):
            for row, sample in enumerate(order[first : first + BATCH].tolist()):
                fetched[row] = tokens[sample * LENGTH : sample * LENGTH + LENGTH + 1]
            yield (
                torch.from_numpy(fetched[:, :-1].astype(np.int64, order="C")),
                torch.from_numpy(fetched[:, 1:].astype(np.int64, order="C")),
            )

    epoch = samples // BATCH * BATCH - BATCH
    if not cold:
        for _ in batches():
            pass
    return measure(batches, epoch)


def make_mds(work: Path, _: bool) -> dict[str, Any]:
    from streaming import MDSWriter

    folder = work / "mds"
    if not (folder / "index.json").exists():
        tokens = np.memmap(work / "flat.bin", dtype=np.uint16, mode="r")
        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}) as writer:
            for sample in range((len(tokens) - 1) // LENGTH):
                writer.write({"tokens": np.array(tokens[sample * LENGTH : sample * LENGTH + LENGTH + 1])})
    return {}


def read_mosaicml(work: Path, cold: bool) -> dict[str, Any]:
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=BATCH)

    def batches() -> Iterator[Any]:
        fetched = np.empty((BATCH, LENGTH + 1), np.uint16)
        for place, sample in enumerate(dataset):
            fetched[place % BATCH] = sample["tokens"]
            if place % BATCH == BATCH - 1:
                yield (
                    torch.from_numpy(fetched[:, :-1].astype(np.int64, order="C")),
                    torch.from_numpy(fetched[:, 1:].astype(np.int64, order="C")),
                )

    # A quarter of an epoch: it is the slowest by far.
    return measure(batches, dataset.size // 4 // BATCH * BATCH)


def start(work: Path, _: bool, share: float = 0.0) -> dict[str, Any]:
    import torch  # noqa: F401

    import data_pipeline.reading.stream  # noqa: F401

    started = time.perf_counter()
    stream = open_ours(work)
    stream.batch(int(stream.samples_per_epoch * share), BATCH)
    return {"seconds": time.perf_counter() - started}


def start_late(work: Path, cold: bool) -> dict[str, Any]:
    return start(work, cold, 0.9)


def open_large(work: Path, _: bool) -> dict[str, Any]:
    from data_pipeline.corpus.corpus import Corpus
    from data_pipeline.corpus.manifest import Manifest
    from data_pipeline.ordering.mixture import MixtureConfig
    from data_pipeline.reading.stream import SampleStream

    imports = resident_mib()
    started = time.perf_counter()
    corpus = Corpus(work / "large", Manifest.read(work / "large"))
    stream = SampleStream(corpus, "train", LENGTH, 0, MixtureConfig({s: float(n) for s, n in SOURCES.items()}))
    opened = time.perf_counter() - started
    origins = [stream.origin(index) for index in (0, stream.samples_per_epoch // 2, stream.samples_per_epoch * 9 // 10)]
    return {
        "seconds": opened,
        "seconds_with_3_origins": time.perf_counter() - started,
        "rss_mib": [imports, resident_mib()],
        "samples": stream.samples_per_epoch,
        "epochs": [origin.epoch for origin in origins],
    }


CHILDREN = {
    "ours": read_ours,
    "ours, 1 in 128 offsets in memory": read_ours_sparse,
    "memmap": read_memmap,
    "make_mds": make_mds,
    "mosaicml": read_mosaicml,
    "start": start,
    "start at 90 % of an epoch": start_late,
    "a million shards": open_large,
}


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> str:
    """The result file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        "# Reading samples in a global random order",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}; commit {commit}",
        f"- machine: {os.cpu_count()} cores, {_processor()}, shared with other jobs; load {os.getloadavg()[0]:.1f}",
        f"- versions: Python {platform.python_version()}, NumPy {np.__version__}, mosaicml-streaming "
        f"{_mds_version(options.mds_python)}",
        f"- command: python {' '.join(sys.argv)}",
        f"- corpus: {options.tokens / 1e6:.0f} M uint16 tokens, {LENGTH} a sample, batches of {BATCH}",
        "",
        f"Best (median) of {options.rounds} runs, each in a fresh process; rates per CPU-second, after a first batch.",
        "",
        "| reader | M tokens per CPU-s | samples per CPU-s | M tokens/s by the clock | RSS at 10 % and 100 %, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if "tokens_per_cpu_second" not in runs[0]:
            continue
        rates = [run["tokens_per_cpu_second"] / 1e6 for run in runs]
        best = max(runs, key=lambda run: run["tokens_per_cpu_second"])
        lines.append(
            f"| {name} | {max(rates):.0f} ({statistics.median(rates):.0f}) | {best['samples_per_cpu_second']:,.0f} | "
            f"{best['tokens_per_second'] / 1e6:.0f} | {best['rss_mib'][0]:.0f}, {best['rss_mib'][1]:.0f} |"
        )
    lines.append("")
    for peer in ("memmap", "mosaicml"):
        if peer in results:
            ratios = [
                ours["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"]
                for ours, theirs in zip(results["ours"], results[peer], strict=True)
            ]
            best = [max(run["tokens_per_cpu_second"] for run in results[name]) for name in ("ours", peer)]
            lines.append(
                f"- ours against {peer}: {best[0] / best[1]:.2f} times, best against best; round by round "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}"
            )
    for name in ("start", "start at 90 % of an epoch"):
        best = min(run["seconds"] for run in results[name])
        lines.append(f"- {name}: manifest to first batch in {best * 1000:.0f} ms")
    large = min(results["a million shards"], key=lambda run: run["seconds"])
    lines.append(
        f"- a million shards, 627 G tokens, {large['samples']:,} samples, 7 sources by weight: opened in "
        f"{large['seconds']:.2f} s, {large['seconds_with_3_origins']:.2f} s with the places of three samples; RSS "
        f"{large['rss_mib'][1]:.0f} MiB, of which {large['rss_mib'][0]:.0f} are imports"
    )
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _mds_version(python: Path | None) -> str:
    if python is None:
        return "not installed"
    code = "import importlib.metadata as m; print(m.version('mosaicml-streaming'), 'with torch', m.version('torch'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
