"""Small corpora made on the spot; nothing is read from outside the test's own folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import zstandard

from data_pipeline.preparing.config import PrepareConfig
from data_pipeline.preparing.prepare import prepare
from data_pipeline.sources.config import DataConfig, SplitConfig
from data_pipeline.tokenizing.config import TokenizerConfig

LABELS = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaBook")
SYLLABLES = ("ga", "me", "lo", "tri", "sta", "ring", "op", "ain", "ver", "chun", "dex", "qu")
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES] + [
    "the",
    "of",
    "self.value",
    "=",
    "for",
    "in",
    "\n    ",
    "12",
    "é",
]
TOKENIZER = TokenizerConfig(vocab_size=400, sample_bytes=200_000)


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def sample_texts() -> list[str]:
    rng = random.Random(0)
    return [random_text(rng, 400) for _ in range(30)]


def write_slimpajama(root: Path, files: int = 4, documents: int = 30, seed: int = 0) -> list[str]:
    """A small data set in SlimPajama's layout, `files` files in train; returns the texts of train in order."""
    rng = random.Random(seed)
    texts = []
    for split, count in (("train", files), ("validation", 1), ("test", 1)):
        for number in range(count):
            folder = root / split / f"chunk{1 + number // 12}"
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for _ in range(documents):
                text = random_text(rng, rng.choice((3, 20, 60, 300)))
                lines.append(json.dumps({"text": text, "meta": {"redpajama_set_name": rng.choice(LABELS)}}))
                if split == "train":
                    texts.append(text)
            data = "\n".join(lines).encode() + b"\n"
            (folder / f"example_{split}_{number}.jsonl.zst").write_bytes(zstandard.compress(data))
    return texts


def slimpajama_config(root: Path, output: Path, **changes: object) -> PrepareConfig:
    data = DataConfig(
        kind="jsonl",
        path=str(root),
        files=["**/*.jsonl.zst", "**/*.jsonl"],
        source_field="meta.redpajama_set_name",
        split=SplitConfig(rule="given"),
    )
    settings = {"data": data, "tokenizer": TOKENIZER, "output": str(output), "shard_bytes": 4000, "unit_bytes": 1}
    return PrepareConfig(**{**settings, **changes})


def quietly(config: PrepareConfig, lines: list[str] | None = None):
    """Prepare without a bar; returns (manifest, what was logged), which `lines` gets also where it fails."""
    lines = [] if lines is None else lines
    manifest = prepare(config, log=lines.append, show_progress=False)
    return manifest, "\n".join(lines)
