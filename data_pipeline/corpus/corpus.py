"""A prepared corpus opened for reading: its manifest, its tokenizer, and each source as a sequence of tokens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from conf.passwords import without_passwords
from data_pipeline.corpus.blocks import RESTORE
from data_pipeline.corpus.files import BLOCK_BYTES, hash_file, path_in
from data_pipeline.corpus.manifest import MANIFEST_FILE, Manifest
from data_pipeline.corpus.open_files import OpenFiles
from data_pipeline.corpus.remote import OPEN_CACHED_FILES, CacheSettings, RemoteCorpus, is_remote
from data_pipeline.corpus.shard_table import ShardEntry, shard_path
from data_pipeline.corpus.token_sequence import TokenSequence
from data_pipeline.errors import CorpusError, TokenizerError
from data_pipeline.tokenizing.tokenizer import Tokenizer

CHECKS = ("none", "size", "hash")


def open_corpus(
    directory: str | Path,
    *,
    check: str = "size",
    cache_directory: str | Path | None = None,
    cache_gib: float = 100.0,
) -> Corpus:
    """Open a prepared corpus: the folder that `python -m data_pipeline prepare output=DIR` wrote, or its URL.

        corpus = open_corpus("corpora/demo")
        print(corpus.splits, corpus.sources("train"), corpus.tokens("train"))
        text = corpus.tokenizer().decode([17, 4, 9])

    `check` as in `Corpus.open`. A corpus at a URL (s3://..., any file system of fsspec) is read through
    `cache_directory`, a folder on a local disk that may hold `cache_gib` GiB of it. Raises CorpusError that names the
    file which is missing, altered, or of another version.
    """
    cache = None if cache_directory is None else CacheSettings(Path(cache_directory), int(cache_gib * 2**30))
    return Corpus.open(directory, check, cache)


class Corpus:
    """A prepared corpus. Use `open_corpus`, or `Corpus.open`.

    `directory`: its folder or URL, as it was given but for a password. `folder`: where its files but the shards lie on
    this machine.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, remote: RemoteCorpus | None = None):
        self.directory = directory
        self.folder = Path(directory) if remote is None else remote.folder
        self.manifest = manifest
        if remote is None:
            self._files = OpenFiles(self._shard_path, len(manifest.shards))
        else:
            self._files = OpenFiles(remote.name, len(manifest.shards), OPEN_CACHED_FILES, remote)
        self._sequences: dict[tuple[str, str], TokenSequence] = {}
        self._tokenizer: Tokenizer | None = None

    @staticmethod
    def open(directory: str | Path, check: str = "size", cache: CacheSettings | None = None) -> Corpus:
        """Open the corpus in `directory`: manifest, table of shards and tokenizer are checked, shards when first read.

        `check`: what is looked at of every shard beforehand. "none": nothing; "size": its file is there and has its
        size; "hash": every byte (about 10 GB/s). Raises CorpusError, naming the first faulty file.

        `directory` may be a URL of any file system that fsspec knows; its shards are read through `cache`, and `check`
        does not apply.
        """
        if check not in CHECKS:
            raise ValueError(f"Corpus.open: check must be one of {', '.join(CHECKS)}, got '{check}'")
        if is_remote(directory):
            return Corpus._open_remote(str(directory), cache)
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if not len(manifest.shards):
            raise CorpusError(f"{directory}: the corpus is empty; prepare another from a source that holds documents")
        if check != "none":
            _check_sizes(directory, manifest)
        if check == "hash":
            for entry in manifest.shards:
                problem = check_shard_file(directory, entry, with_hash=True)
                if problem:
                    raise CorpusError(f"{shard_path(directory, entry.file)}: {problem}; {RESTORE}")
        corpus = Corpus(directory, manifest)
        corpus.tokenizer()
        return corpus

    @staticmethod
    def _open_remote(url: str, cache: CacheSettings | None) -> Corpus:
        if cache is None:
            shown = without_passwords(url)
            raise CorpusError(f"{shown}: a remote corpus needs a cache on a local disk; set corpus.cache_directory")
        remote = RemoteCorpus(url, cache)
        remote.copy_description()
        manifest = Manifest.read(remote.folder)
        if not len(manifest.shards):
            raise CorpusError(f"{remote.url}: the corpus is empty; prepare another from a source that holds documents")
        remote.use(manifest)
        corpus = Corpus(remote.url, manifest, remote)
        corpus.tokenizer()
        return corpus

    @property
    def fingerprint(self) -> str:
        """Identity of the data (hex sha256): equal fingerprints mean equal tokens in equal order."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        return self.manifest.tokenizer.eod_id

    @property
    def splits(self) -> list[str]:
        return sorted(self.manifest.splits)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the shards. Raises CorpusError when its file does not belong to them."""
        if self._tokenizer is None:
            entry = self.manifest.tokenizer
            path = path_in(self.folder, entry.file, MANIFEST_FILE, "tokenizer.file")
            if not path.is_file():
                raise CorpusError(
                    f"{path}: the corpus' tokenizer is missing; restore it or prepare the corpus again elsewhere"
                )
            try:
                tokenizer = Tokenizer.load(path, entry.eod_token)
            except TokenizerError as error:
                raise CorpusError(f"{error}; restore the file or prepare the corpus again elsewhere") from None
            if tokenizer.fingerprint != entry.fingerprint:
                raise CorpusError(
                    f"{path}: not the tokenizer that wrote this corpus (fingerprint {tokenizer.fingerprint[:12]}, the "
                    f"manifest has {entry.fingerprint[:12]}); restore the file or prepare the corpus again elsewhere"
                )
            if tokenizer.probe_sha256 != entry.probe_sha256 and tokenizer.library_version == entry.library_version:
                raise CorpusError(
                    f"{path}: the same {entry.library} {entry.library_version} encoded text differently when it wrote "
                    "this corpus (a tokenizer with dropout, or a changed library); prepare the corpus again elsewhere"
                )
            if tokenizer.probe_sha256 != entry.probe_sha256:
                raise CorpusError(
                    f"{path}: {entry.library} {tokenizer.library_version} encodes text differently from "
                    f"{entry.library} {entry.library_version}, which wrote this corpus; install that version"
                )
            for key in ("eod_id", "vocab_size"):
                if getattr(tokenizer, key) != getattr(entry, key):
                    raise CorpusError(
                        f"{self.folder / MANIFEST_FILE}: its tokenizer.{key} is {getattr(entry, key)}, that of {path} "
                        f"{getattr(tokenizer, key)}; {RESTORE}"
                    )
            self._tokenizer = tokenizer
        return self._tokenizer

    def sources(self, split: str) -> list[str]:
        """Source labels of a split, sorted. Raises CorpusError for a split that the corpus lacks."""
        if split not in self.manifest.splits:
            raise CorpusError(f"{self.directory}: no split '{split}'; the corpus has {', '.join(self.splits)}")
        return sorted(self.manifest.splits[split])

    def tokens(self, split: str, source: str | None = None) -> int:
        """Token ids in a split (or in one source of it), end-of-document ids included."""
        return sum(self.sequence(split, label).tokens for label in ([source] if source else self.sources(split)))

    def text_bytes(self, split: str, source: str | None = None) -> int:
        """UTF-8 bytes of the text of a split (or of one source of it)."""
        labels = [source] if source else self.sources(split)
        return sum(self.manifest.splits[split][label]["text_bytes"] for label in labels)

    def sequence(self, split: str, source: str) -> TokenSequence:
        """All tokens of one source of a split, in manifest order."""
        if source not in self.sources(split):
            raise CorpusError(
                f"{self.directory}: no source '{source}' in split '{split}'; it has {', '.join(self.sources(split))}"
            )
        if (split, source) not in self._sequences:
            rows = self.manifest.shards.rows(split, source)
            self._sequences[split, source] = TokenSequence(self.manifest, rows, self._files)
        return self._sequences[split, source]

    def _shard_path(self, row: int) -> Path:
        return shard_path(self.folder, self.manifest.shards.file(row))


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    """Raises CorpusError for the first shard whose file is missing or has another size."""
    folder = str(directory)
    # Folders of shards that were found to be the corpus' own.
    own: set[str] = set()
    for row, expected in enumerate(manifest.shards.bytes.tolist()):
        name = manifest.shards.file(row)
        path = os.path.join(folder, name)
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or os.path.dirname(path) not in own:
                found = os.stat(shard_path(directory, name))
                own.add(os.path.dirname(path))
            size = found.st_size
        except OSError:
            raise CorpusError(f"{path}: the shard is missing; {RESTORE}") from None
        if size != expected:
            kind = "truncated" if size < expected else "altered"
            raise CorpusError(f"{path}: {kind}: {size} bytes, the manifest says {expected}; {RESTORE}")


def check_shard_file(directory: Path, entry: ShardEntry, with_hash: bool, with_sha256: bool = False) -> str | None:
    """How the file of a shard differs from its manifest entry; None when it does not."""
    path = shard_path(directory, entry.file)
    if not path.is_file():
        return "the shard is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"truncated: {size} bytes, the manifest says {entry.bytes}"
    if size > entry.bytes:
        return f"altered: {size} bytes, the manifest says {entry.bytes}"
    if not with_hash:
        return None
    found = hash_file(path, with_sha256)
    for number, (mine, theirs) in enumerate(zip(found.xxh3_64_blocks, entry.xxh3_64_blocks, strict=False)):
        if mine != theirs:
            first, last = number * BLOCK_BYTES, min(size, (number + 1) * BLOCK_BYTES) - 1
            return (
                f"altered: the {BLOCK_BYTES / 2**20:g} MiB block {number} (bytes {first} to {last}) has another "
                "content than when it was written (xxh3 differs)"
            )
    if found.xxh3_128 != entry.xxh3_128 or with_sha256 and found.sha256 != entry.sha256:
        return "altered: it has another content than when it was written (checksum differs)"
    return None
