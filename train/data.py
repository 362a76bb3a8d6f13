"""The data of a run: its corpus, its order of samples, and what the position in a checkpoint is a position of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from conf.problems import at_least, choice, positive
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.remote import CacheSettings, is_remote
from data_pipeline.errors import CorpusError
from data_pipeline.network import validate_network
from data_pipeline.ordering.config import validate_order
from data_pipeline.ordering.mixture import check_mixture
from data_pipeline.reading.batch import ON_CORRUPT
from data_pipeline.reading.live import LiveCorpus, LiveStream
from data_pipeline.reading.run_order import mixture_of, open_order
from data_pipeline.reading.stream import Lanes, SampleStream
from data_pipeline.reading.task_stream import TRAIN, TaskCorpus, TaskStream
from data_pipeline.sources.config import validate_data
from data_pipeline.tasks.tasks import validate_task
from data_pipeline.tokenizing.config import validate_tokenizer
from train.config import CorpusConfig, LiveConfig, RunConfig
from train.plan import Plan

# Prepared, tokenized while it is read, or made.
RunCorpus = Corpus | LiveCorpus | TaskCorpus
RunStream = SampleStream | LiveStream | TaskStream


def validate_corpus(config: CorpusConfig) -> list[str]:
    """Every problem of the keys under `corpus` that shows without the corpus, one line each."""
    problems = _validate_place(config)
    if config.directory is not None and is_remote(config.directory) and config.cache_directory is None:
        problems.append(
            f"corpus.cache_directory: a corpus at a URL ({config.directory}) is read through a cache; set it to a "
            "folder on a local disk"
        )
    problems += positive("corpus.cache_gib", config.cache_gib)
    problems += positive("corpus.max_epochs", config.max_epochs)
    problems += validate_order(config, "corpus")
    problems += choice("corpus.on_corrupt", config.on_corrupt, ON_CORRUPT)
    problems += at_least("corpus.prefetch_steps", config.prefetch_steps, 1)
    problems += at_least("corpus.workers", config.workers, 1)
    problems += validate_network(config.network, "corpus.network")
    if config.allow_changed_data is not None and not config.allow_changed_data.strip():
        problems.append("corpus.allow_changed_data: empty; give the reason, or null to refuse changed data")
    return problems


def _validate_place(config: CorpusConfig) -> list[str]:
    if sum(place is not None for place in (config.directory, config.live, config.task)) != 1:
        return [
            f"corpus.directory: set exactly one of corpus.directory ({config.directory}), corpus.live and corpus.task, "
            "the others to null"
        ]
    if config.task is not None:
        usual = {"split": TRAIN, "max_epochs": CorpusConfig.max_epochs}
        return _not_of_a_corpus(config, "examples of a task are made one after another", usual)
    return [] if config.live is None else _validate_live(config, config.live)


def _validate_live(config: CorpusConfig, live: LiveConfig) -> list[str]:
    problems = validate_data(live.data, "corpus.live.data")
    problems += validate_tokenizer(live.tokenizer, "corpus.live.tokenizer")
    if live.tokenizer.kind != "file":
        problems.append(
            f"corpus.live.tokenizer.kind: a run does not train its tokenizer ({live.tokenizer.kind}); set it to file"
        )
    if config.max_epochs > 0 and not float(config.max_epochs).is_integer():
        problems.append(
            "corpus.max_epochs: text that is tokenized while it is read is read in whole passes "
            f"({config.max_epochs}); set it to a whole number"
        )
    return problems + _not_of_a_corpus(config, "text that is tokenized while it is read is taken as it comes", {})


def _not_of_a_corpus(config: CorpusConfig, why: str, usual: dict[str, Any]) -> list[str]:
    """Keys that only a prepared corpus has a use for, and those of `usual`, where they are set to something else."""
    usual = {"weights": None, "temperature": None, "epoch_caps": None, "phases": []} | usual
    usual |= {"packing": "concatenate", "window_shards": None, "on_corrupt": "fail"}
    usual |= {"cache_directory": None, "workers": 1}
    return [
        f"corpus.{key}: {why} ({getattr(config, key)}); set corpus.{key}={'null' if value is None else value}, or "
        "prepare a corpus"
        for key, value in usual.items()
        if getattr(config, key) != value
    ]


def validate_task_of_run(config: RunConfig) -> list[str]:
    """Every problem of the run's task, one line each."""
    if config.corpus.task is None:
        return []
    problems = validate_task(config.corpus.task, config.training.sequence_length, "corpus.task")
    if config.training.carry_state:
        problems.append("training.carry_state: each example of a task is a sample of its own (true); set it to false")
    return problems


def open_run_corpus(config: RunConfig, check: str) -> RunCorpus:
    """What the run is trained on. Raises DataError."""
    if config.corpus.task is not None:
        return TaskCorpus(config.corpus.task)
    live = config.corpus.live
    if live is not None:
        return LiveCorpus(live.data, live.tokenizer, config.corpus.split, config.corpus.network)
    # What is missing is then skipped when its turn comes, at the start as later.
    return open_corpus(config, config.corpus.directory, "none" if config.corpus.on_corrupt == "skip" else check)


def open_corpus(config: RunConfig, directory: str | None, check: str) -> Corpus:
    """Open the prepared corpus in a folder or at a URL, through the run's cache. Raises CorpusError."""
    if directory is None:
        raise CorpusError("corpus.directory: this needs a prepared corpus; the run has none")
    cache = None
    if config.corpus.cache_directory is not None:
        limit = int(config.corpus.cache_gib * 2**30)
        cache = CacheSettings(Path(config.corpus.cache_directory), limit, config.corpus.network)
    return Corpus.open(directory, check, cache)


def misfits_of_mixture(config: RunConfig, corpus: RunCorpus) -> list[str]:
    """What the mixture asks of the corpus that it lacks, one line each."""
    if not isinstance(corpus, Corpus):
        return []
    sources = dict.fromkeys(corpus.sources(config.corpus.split), 1)
    mixture = mixture_of(config.corpus, config.training.global_batch_size)
    return [f"corpus.{problem}" for problem in check_mixture(mixture, sources)]


def open_stream(config: RunConfig, corpus: RunCorpus, pin: bool = False) -> RunStream:
    """The run's order of samples. Raises ValueError for settings that the corpus cannot serve, CorpusError."""
    training = config.training
    if isinstance(corpus, TaskCorpus):
        return TaskStream(corpus, config.corpus.split, training.sequence_length, config.seed)
    if isinstance(corpus, LiveCorpus):
        lanes = training.global_batch_size
        return LiveStream(corpus, training.sequence_length, config.seed, lanes, config.corpus.max_epochs)
    return open_order(
        corpus,
        config.corpus,
        training.sequence_length,
        config.seed,
        training.global_batch_size,
        on_corrupt=config.corpus.on_corrupt,
        pin=pin,
        lanes=Lanes(training.global_batch_size, training.carry_windows) if training.carry_state else None,
    )


def too_little_data(config: RunConfig, plan: Plan, stream: RunStream) -> list[str]:
    """Where the run is longer than its data allow, one line each; of text tokenized on the way it shows later."""
    if not isinstance(stream, SampleStream):
        return []
    samples = plan.total_samples
    length = "training.total_tokens" if config.training.total_steps is None else "training.total_steps"
    if stream.limit is not None and samples > stream.limit:
        return [
            f"corpus.epoch_caps: every source has reached its cap after {stream.limit:,} samples, the run takes "
            f"{samples:,}; raise the caps or lower {length}"
        ]
    return [
        f"corpus.max_epochs: the run reads source '{source}' {count:.2f} times, more than {config.corpus.max_epochs}; "
        f"lower {length}, prepare more data, or raise corpus.max_epochs"
        for source, count in stream.epochs(samples).items()
        if count > config.corpus.max_epochs
    ]


def describe_data(config: RunConfig, plan: Plan, stream: RunStream) -> str:
    """What the run reads, as the lines that it prints at its start."""
    samples = plan.total_samples
    left = f" left of {samples:,}" if plan.completed_steps else ""
    shown = f"{plan.steps_left * plan.global_batch_size:,} samples{left}"
    if isinstance(stream, TaskStream):
        return f"data       {shown} of {stream.corpus.directory}, order {stream.fingerprint[:16]}"
    if isinstance(stream, LiveStream):
        lines = [f"data       {shown}, tokenized while they are read, order {stream.fingerprint[:16]}"]
        lines += [f"           {note}" for note in stream.corpus.notes]
        if stream.corpus.why_not_again:
            lines.append(f"           the run cannot be resumed: {stream.corpus.why_not_again}")
        lines += _describe_vocabulary(config, stream.corpus.vocab_size)
        return "\n".join(lines)
    epochs, sizes = stream.epochs(samples), stream.sizes
    lines = [f"data       {shown}, order {stream.fingerprint[:16]}"]
    lines += [
        f"           {source}: {passes * sizes[source] / samples:.2%} of the samples, {passes:.3g} epochs"
        for source, passes in epochs.items()
    ]
    if stream.packing_plan is not None:
        padding = sum(s.padding for s in stream.packing_plan.statistics.values())
        tokens = sum(s.tokens for s in stream.packing_plan.statistics.values())
        cut = sum(s.cut for s in stream.packing_plan.statistics.values())
        documents = sum(s.documents for s in stream.packing_plan.statistics.values())
        lines.append(
            f"packing    best fit: {padding / (padding + tokens):.2%} padding, {cut:,} of {documents:,} documents are "
            "longer than a sample"
        )
    lines += _describe_vocabulary(config, stream.corpus.vocab_size)
    return "\n".join(lines + _describe_cache(config, stream))


def _describe_vocabulary(config: RunConfig, tokens: int) -> list[str]:
    """What a vocabulary that is larger than the tokenizer's costs; up to the next multiple of 128 it is usual."""
    ids, enough = config.model.vocab_size, -(-tokens // 64) * 64
    if ids <= -(-tokens // 128) * 128:
        return []
    matrices = 1 if config.model.tie_embeddings else 2
    wasted = (ids - enough) * config.model.d_model * matrices
    return [
        f"vocabulary HINT: the tokenizer has {tokens:,} ids, the model {ids:,}: {wasted:,} parameters that no text",
        f"           uses, and time in the loss; model.vocab_size={enough} is enough",
    ]


def _describe_cache(config: RunConfig, stream: SampleStream) -> list[str]:
    """What a remote corpus that is larger than its cache costs in fetches."""
    limit, table = config.corpus.cache_gib * 2**30, stream.corpus.manifest.shards
    shards = [table.bytes[table.rows(stream.split, source)] for source in stream.mixture.sources]
    total, largest = sum(int(sizes.sum()) for sizes in shards), max(int(sizes.max()) for sizes in shards)
    if not is_remote(stream.corpus.directory) or total <= limit:
        return []
    sizes = f"{total / 2**30:.3g} GiB of shards, {config.corpus.cache_gib:.3g} GiB of cache a node"
    window = config.corpus.window_shards
    if window is None:
        missing, block = 1 - limit / total, min(stream.corpus.manifest.block_bytes, largest)
        fetched = config.training.global_batch_size * missing * block / 2**30
        return [
            f"cache      WARNING: {sizes}: in a full permutation {missing:.0%} of the samples each fetch a block,",
            f"           about {fetched:.3g} GiB a step; set corpus.window_shards, or copy the corpus to the nodes",
        ]
    # One window ends while the next begins; in a mixture each source has its own.
    held = stream.mixture.orders * 2 * window * largest
    warning = "" if held <= limit else "WARNING, more than the cache: lower corpus.window_shards. "
    return [f"cache      {sizes}: {warning}Windows of {window} shards hold up to {held / 2**30:.3g} GiB"]


def data_identity(stream: RunStream) -> dict[str, Any]:
    """What `next_sample` of a checkpoint counts: equal identities mean that every sample is the same."""
    return {**stream.identity, "order": stream.fingerprint}


def changes_of_data(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """key -> [then, now] of what differs."""
    return {key: [saved.get(key), now.get(key)] for key in sorted({**saved, **now}) if saved.get(key) != now.get(key)}


def describe_changes(changes: dict[str, list[Any]]) -> str:
    """`changes`, as `changes_of_data` finds them, in a line."""
    return "; ".join(f"{key}: {_short(then)} then, {_short(now)} now" for key, (then, now) in changes.items())


def _short(value: Any) -> str:
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        # The beginning of a sha256 tells two apart.
        return text[:12]
    return text if len(text) <= 64 else f"{text[:61]}..."
