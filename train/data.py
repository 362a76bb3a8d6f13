"""The data of a run: its corpus, its order of samples, and what the position in a checkpoint is a position of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.mixture import MixtureConfig, Phase, check_mixture
from data_pipeline.remote import CacheSettings, is_remote
from data_pipeline.stream import SampleStream
from train.config import CorpusConfig, RunConfig
from train.plan import Plan


def mixture_of(config: RunConfig) -> MixtureConfig:
    """The mixture in samples: phases of the configuration may begin at a step."""
    corpus = config.corpus
    phases = tuple(
        Phase(
            phase.from_sample if phase.from_step is None else phase.from_step * config.training.global_batch_size,
            phase.weights,
            phase.temperature,
        )
        for phase in corpus.phases
    )
    return MixtureConfig(corpus.weights, corpus.temperature, corpus.epoch_caps, phases)


def validate_corpus(config: CorpusConfig) -> list[str]:
    """Every problem of the keys under `corpus` that shows without the corpus, one line each."""
    problems = []
    if is_remote(config.directory) and config.cache_directory is None:
        problems.append(
            f"corpus.cache_directory: a corpus at a URL ({config.directory}) is read through a cache; set it to a "
            "folder on a local disk"
        )
    if not config.cache_gib > 0:
        problems.append(f"corpus.cache_gib: must be positive ({config.cache_gib})")
    if config.max_epochs <= 0:
        problems.append(f"corpus.max_epochs: must be positive ({config.max_epochs})")
    for source, weight in (config.weights or {}).items():
        if not weight >= 0:
            problems.append(f"corpus.weights.{source}: a share cannot be negative ({weight})")
    if config.weights is not None and not sum(config.weights.values()) > 0:
        problems.append(
            "corpus.weights: at least one share must be positive; set it to null to use sources as they are"
        )
    for number, phase in enumerate(config.phases):
        if (phase.from_step is None) == (phase.from_sample is None):
            problems.append(
                f"corpus.phases[{number}]: set exactly one of from_step ({phase.from_step}) and from_sample "
                f"({phase.from_sample}), the other to null"
            )
    for key, choices in (("packing", ("concatenate", "best_fit")), ("on_corrupt", ("fail", "skip"))):
        if getattr(config, key) not in choices:
            problems.append(
                f"corpus.{key}: no such choice ({getattr(config, key)!r}); choose one of {', '.join(choices)}"
            )
    if config.packing != "best_fit" and config.packing_directory is not None:
        problems.append(
            f"corpus.packing_directory: only packing=best_fit keeps a plan ({config.packing_directory!r}); set it to "
            "null"
        )
    for key in ("prefetch_steps", "workers"):
        if getattr(config, key) < 1:
            problems.append(f"corpus.{key}: must be at least 1 ({getattr(config, key)})")
    if config.allow_changed_data is not None and not config.allow_changed_data.strip():
        problems.append("corpus.allow_changed_data: empty; give the reason, or null to refuse changed data")
    return problems


def open_corpus(config: RunConfig, directory: str, check: str) -> Corpus:
    """Open the corpus in a folder or at a URL, through the run's cache. Raises CorpusError."""
    cache = None
    if config.corpus.cache_directory is not None:
        cache = CacheSettings(Path(config.corpus.cache_directory), int(config.corpus.cache_gib * 2**30))
    return Corpus.open(directory, check, cache)


def misfits_of_mixture(config: RunConfig, corpus: Corpus) -> list[str]:
    """What the mixture asks of the corpus that it lacks, one line each."""
    sources = dict.fromkeys(corpus.sources(config.corpus.split), 1)
    return [f"corpus.{problem}" for problem in check_mixture(mixture_of(config), sources)]


def open_stream(config: RunConfig, corpus: Corpus, pin: bool = False) -> SampleStream:
    """The run's order of samples. Raises ValueError for settings that the corpus cannot serve, CorpusError."""
    packing_directory = config.corpus.packing_directory
    return SampleStream(
        corpus,
        config.corpus.split,
        config.training.sequence_length,
        config.seed,
        mixture_of(config),
        packing=config.corpus.packing,
        packing_directory=None if packing_directory is None else Path(packing_directory),
        on_corrupt=config.corpus.on_corrupt,
        pin=pin,
    )


def too_little_data(config: RunConfig, plan: Plan, stream: SampleStream) -> list[str]:
    """Where the run is longer than its data allow, one line each."""
    samples = plan.total_steps * plan.global_batch_size
    if stream.limit is not None and samples > stream.limit:
        return [
            f"corpus.epoch_caps: every source has reached its cap after {stream.limit:,} samples, the run takes "
            f"{samples:,}; raise the caps or shorten training.total_tokens"
        ]
    return [
        f"corpus.max_epochs: the run reads source '{source}' {count:.2f} times, more than {config.corpus.max_epochs}; "
        "shorten training.total_tokens, prepare more data, or raise corpus.max_epochs"
        for source, count in stream.mixture.epochs(samples).items()
        if count > config.corpus.max_epochs
    ]


def describe_data(plan: Plan, stream: SampleStream) -> str:
    """What the run reads, as the lines that it prints at its start."""
    samples = plan.total_steps * plan.global_batch_size
    counts, epochs = stream.mixture.counts(samples), stream.mixture.epochs(samples)
    lines = [f"data       {samples:,} samples, order {stream.fingerprint[:16]}"]
    lines += [
        f"           {source}: {counts[source] / samples:.2%} of the samples, {epochs[source]:.2f} epochs"
        for source in epochs
    ]
    if stream.plan is not None:
        padding = sum(s.padding for s in stream.plan.statistics.values())
        tokens = sum(s.tokens for s in stream.plan.statistics.values())
        cut = sum(s.cut for s in stream.plan.statistics.values())
        documents = sum(s.documents for s in stream.plan.statistics.values())
        lines.append(
            f"packing    best fit: {padding / (padding + tokens):.2%} padding, {cut:,} of {documents:,} documents are "
            "longer than a sample"
        )
    return "\n".join(lines)


def data_identity(stream: SampleStream) -> dict[str, Any]:
    """What `next_sample` of a checkpoint counts: equal identities mean that every sample is the same."""
    return {**stream.identity, "order": stream.fingerprint}


def changes_of_data(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """key -> [then, now] of what differs."""
    return {key: [saved.get(key), now.get(key)] for key in sorted({**saved, **now}) if saved.get(key) != now.get(key)}


def refuse_changed_data(changes: dict[str, list[Any]], checkpoint: Path) -> None:
    """Raises CorpusError that shows `changes`."""
    shown = [f"{key}: {_short(then)} then, {_short(now)} now" for key, (then, now) in changes.items()]
    raise CorpusError(
        f"{checkpoint} was trained on other data ({'; '.join(shown)}), so its position means nothing here. Go back to "
        "the data it was trained on, or give the reason for the change in corpus.allow_changed_data='...'"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."
