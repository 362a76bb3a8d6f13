"""Which split a file or a document belongs to: what its name spells, or a hash of its name or text."""

from __future__ import annotations

import hashlib
import json
import re

import xxhash

from data_pipeline.errors import PrepareError
from data_pipeline.sources.config import SplitConfig

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def split_by_name(name: str, split: SplitConfig) -> str:
    """The split of a file: a pure function of its name and of `split.seed`."""
    key = json.dumps([split.seed, name], ensure_ascii=True)
    return _split_at(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64, split)


def split_by_text(text: str, split: SplitConfig) -> str:
    """The split of a document: a pure function of its text and of `split.seed`, which prefixes what is hashed."""
    digest = xxhash.xxh3_64(f"{split.seed} ".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return _split_at(digest.intdigest() / 2**64, split)


def _split_at(share: float, split: SplitConfig) -> str:
    if share < split.validation_fraction:
        return "validation"
    return "test" if share < split.validation_fraction + split.test_fraction else "train"


def given_split(name: str) -> str:
    """The split that a relative name spells: a folder `train/...`, or a file `validation-00000.parquet`."""
    for part in name.split("/"):
        word = re.split(r"[-_.]", part)[0].lower()
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    raise PrepareError(
        f"{name}: neither a folder nor the file's name says train, validation or test; sort the files into such "
        "folders or set data.split.rule=hash"
    )
