"""How fast is `prepare` on one core, against its tokenizer library alone and against Hugging Face tokenizers?

    python -m benchmarks.data_prepare CORPUS TOKENIZER --output benchmarks/results/NAME.md

CORPUS is a folder in SlimPajama's layout, TOKENIZER a tokenizer.json or a SentencePiece model. Every measurement runs
alone in a fresh process, --rounds times in turn, on one thread; rates are megabytes of UTF-8 text per CPU-second,
imports and loading not counted, and every library starts with empty caches.

What is measured: "alone": the documents of the training files, in memory, to one flat array of uint16 or uint32, as str
in batches of 256 and as bytes in the batches that `prepare` makes. "prepare": the same files from the disk to shards on
the disk: decompression, JSON, labels, encoding, comparison with the reference, hashes, writing. "reading": up to the
documents as str. "least": what no preparation that hands bytes to the library can leave out, in one loop:
decompression, JSON to str, UTF-8, encoding, narrowing, sha256, writing and flushing to the disk; no accounts, labels,
comparison or checks. The reference library is measured on the first --reference-bytes of the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import zstandard

from data_pipeline.errors import TokenizerError
from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.progress import METER_LENGTH, Meter
from data_pipeline.preparing.units import BATCH_BYTES, run_unit
from data_pipeline.sources import file_sources
from data_pipeline.sources.archives import read_lines
from data_pipeline.sources.config import DataConfig, SplitConfig
from data_pipeline.sources.source import Document, InputFile, Source
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.encoders import BACKENDS, DISTRIBUTIONS, Encode, build_encoder, choose_encoder
from data_pipeline.tokenizing.tokenizer import Tokenizer, token_dtype

ROOT = Path(__file__).resolve().parents[1]
BATCH_DOCUMENTS = 256
MEASUREMENTS = {
    "alone": f"alone: str in batches of {BATCH_DOCUMENTS}",
    "batches": f"alone: bytes in batches of {BATCH_BYTES >> 20} MiB, as prepare gives them",
    "least": "least: no accounts, labels, comparison or checks",
    "prepare": "prepare",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference-bytes", type=int, default=4_000_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("MEASUREMENT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options, *options.child)))
        return
    tokenizer = Tokenizer.load(options.tokenizer)
    source, _ = _open(options)
    sample = [document.text for document in _documents(source, source.inputs()[:1])][:100]
    gates = {name: _gate(tokenizer, name, sample) for name in BACKENDS}
    usable = [name for name, refusal in gates.items() if refusal is None]
    measurements = [("reading", "reference"), ("alone", "reference")]
    measurements += [(kind, name) for name in usable for kind in MEASUREMENTS]
    results: dict[tuple[str, str], list[float]] = {key: [] for key in measurements}
    for number in range(options.rounds):
        for key in measurements:
            results[key].append(_in_a_process(options, key))
            print(f"round {number + 1}: {' '.join(key)}: {results[key][-1]:.1f} MB/s", file=sys.stderr)
    text = _report(options, tokenizer, gates, results)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


def _gate(tokenizer: Tokenizer, name: str, sample: list[str]) -> str | None:
    """Why a library is not used; None when it is."""
    try:
        choose_encoder(tokenizer, name, lambda: sample)
    except TokenizerError as error:
        return str(error)
    return None


def _in_a_process(options: argparse.Namespace, key: tuple[str, str]) -> float:
    paths = [str(options.corpus.resolve()), str(options.tokenizer.resolve())]
    command = [sys.executable, "-m", "benchmarks.data_prepare", *paths, "--child", *key]
    command += ["--reference-bytes", str(options.reference_bytes)]
    variables = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return json.loads(subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE).stdout)


def _open(options: argparse.Namespace) -> tuple[Source, PrepareConfig]:
    data = DataConfig(
        kind="records",
        path=str(options.corpus),
        files=["train/**/*.jsonl.zst"],
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
    )
    return open_source(data), PrepareConfig(data, TokenizerConfig(), output="unused")


def _documents(source: Source, inputs: list[InputFile]) -> list[Document]:
    records = (record for item in inputs for record in source.read(item, lambda count: None))
    return [record for record in records if isinstance(record, Document)]


def _measure(options: argparse.Namespace, measurement: str, backend: str) -> float:
    """MB of text per CPU-second of this process."""
    tokenizer = Tokenizer.load(options.tokenizer)
    source, config = _open(options)
    inputs = source.inputs()
    texts = [document.text for document in _documents(source, inputs)]
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        _warm_up(tokenizer, backend, config, Path(folder), texts[0][:2000])
        if measurement == "reading":
            return _rate(size, lambda: _documents(source, inputs))
        if measurement == "prepare":
            encoder = build_encoder(tokenizer, backend)
            rest = (source, tokenizer, encoder, config, Path(folder), Meter([0] * METER_LENGTH))
            return _rate(size, lambda: run_unit(1, inputs, *rest))
        if measurement == "least":
            encode = BACKENDS[backend](tokenizer)
            dtype = token_dtype(tokenizer.vocab_size)
            return _rate(size, lambda: _prepare_least(source, inputs, encode, dtype, Path(folder) / "tokens"))
        if backend == "reference":
            sizes = np.cumsum([len(text.encode()) for text in texts])
            count = int(np.searchsorted(sizes, options.reference_bytes)) + 1
            texts, size = texts[:count], int(sizes[:count][-1])
        encode = _encode_strings(tokenizer, backend)
        if measurement == "alone":
            batches = [texts[start : start + BATCH_DOCUMENTS] for start in range(0, len(texts), BATCH_DOCUMENTS)]
        else:
            encode = BACKENDS[backend](tokenizer)
            batches = _batches_of_bytes(texts)
        dtype = token_dtype(tokenizer.vocab_size)
        return _rate(size, lambda: np.concatenate([encode(batch)[0].astype(dtype) for batch in batches]))


def _warm_up(tokenizer: Tokenizer, backend: str, config: PrepareConfig, folder: Path, text: str) -> None:
    """Do once, with other objects, what loads modules and starts threads at its first use."""
    path = folder / "train" / "chunk1" / "few.jsonl.zst"
    path.parent.mkdir(parents=True)
    path.write_bytes(zstandard.compress(json.dumps({"text": text}).encode()))
    source = open_source(replace(config.data, path=str(folder)))
    encoder = build_encoder(tokenizer, backend)
    run_unit(0, source.inputs(), source, tokenizer, encoder, config, folder, Meter([0] * METER_LENGTH))


def _prepare_least(source: Source, inputs: list[InputFile], encode: Encode, dtype: np.dtype, path: Path) -> None:
    parse = file_sources.parse_json_fast
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:

        def flush() -> None:
            ids = encode(texts)[0].astype(dtype)
            digest.update(ids)
            file.write(ids)

        texts: list[bytes] = []
        filled = 0
        for item in inputs:
            limits = source.config.max_record_bytes, source.config.max_reader_bytes
            for line in read_lines(source.root / item.name, *limits, lambda count: None):
                texts.append(parse(line)["text"].encode())
                filled += len(texts[-1])
                if filled >= BATCH_BYTES:
                    flush()
                    texts, filled = [], 0
        flush()
        os.fsync(file.fileno())


def _encode_strings(tokenizer: Tokenizer, backend: str) -> Callable[[list[str]], tuple]:
    """A library's own call for a batch of str; the first item of what it returns is one flat array."""
    if backend == "gigatoken":
        import gigatoken

        path = tokenizer.path
        model = gigatoken.Tokenizer.from_sentencepiece(path) if path.suffix == ".model" else gigatoken.Tokenizer(path)
        return lambda texts: (model.encode_batch(texts, parallel=False).layout.content.data,)
    if backend == "fastokens":
        from fastokens import _native

        model = _native.Tokenizer.from_file(str(tokenizer.path))
        return lambda texts: (np.frombuffer(model.encode_batch_flat(texts, False, True)[0], dtype="<u4"),)
    if backend == "splintr":
        import splintr

        model = splintr.from_json(str(tokenizer.path))
        return lambda texts: (np.frombuffer(model.encode_batch_flat(texts)[0], dtype="<u4"),)
    return lambda texts: (np.concatenate(tokenizer.encode_batch(texts)),)


def _batches_of_bytes(texts: list[str]) -> list[list[bytes]]:
    batches: list[list[bytes]] = [[]]
    filled = 0
    for text in texts:
        batches[-1].append(text.encode())
        filled += len(batches[-1][-1])
        if filled >= BATCH_BYTES:
            batches.append([])
            filled = 0
    return [batch for batch in batches if batch]


def _rate(size: int, action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return size / 1e6 / (time.process_time() - start)


def _report(
    options: argparse.Namespace,
    tokenizer: Tokenizer,
    gates: dict[str, str | None],
    results: dict[tuple[str, str], list[float]],
) -> str:
    command = f"python -m benchmarks.data_prepare CORPUS {options.tokenizer.name} --rounds {options.rounds}"
    libraries = ["tokenizers", "sentencepiece", *DISTRIBUTIONS.values(), "msgspec", "zstandard", "pyarrow", "numpy"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        "# Preparing on one core",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}",
        f"- hardware: {os.cpu_count()} cores of {_processor()}, shared with other jobs (load {os.getloadavg()[0]:.1f})",
        f"- versions: Python {platform.python_version()}, " + ", ".join(f"{n} {_version(n)}" for n in libraries),
        f"- commit: {commit.strip()}",
        f"- command: `{command}`",
        f"- corpus: training files of {options.corpus.name}; tokenizer {options.tokenizer.name}, "
        f"{tokenizer.vocab_size:,} ids",
        "",
        "MB of UTF-8 text per CPU-second, one thread, each in a process of its own with empty caches: median of "
        f"{options.rounds} rounds (lowest to highest). Ratios are formed round by round; their median is given.",
        "",
        "| measurement | MB per CPU-second |",
        "|---|---|",
    ]
    for (measurement, backend), rates in results.items():
        name = tokenizer.library if backend == "reference" else backend
        name = "files to documents (zstd, JSON)" if measurement == "reading" else f"{name}, {MEASUREMENTS[measurement]}"
        lines.append(f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) |")
    lines.append("")
    for backend, refusal in gates.items():
        if refusal is not None:
            lines.append(f"- {backend} is not used: {refusal}")
            continue
        mine = results["prepare", backend]
        ratios = {
            "itself alone on str": results["alone", backend],
            "itself alone on large batches of bytes": results["batches", backend],
            f"{tokenizer.library} alone": results["alone", "reference"],
            "the least": results["least", backend],
        }
        parts = [
            f"{statistics.median(a / b for a, b in zip(mine, theirs, strict=True)):.2f} of {name}"
            for name, theirs in ratios.items()
        ]
        lines.append(f"- prepare with {backend}: {', '.join(parts)}")
        share = statistics.median(
            a / b for a, b in zip(results["least", backend], results["batches", backend], strict=True)
        )
        lines.append(f"- the least with {backend}: {share:.2f} of itself alone on large batches of bytes")
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
