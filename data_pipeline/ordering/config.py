"""The order in which a run reads a prepared corpus: keys under `corpus`, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.problems import at_least, choice, exactly_one

# concatenate: documents one after another, cut at the end of each sample. best_fit: no document is cut that fits.
PACKINGS = ("concatenate", "best_fit")


@dataclass(frozen=True)
class MixturePhaseConfig:
    """A later change of the mixture; exactly one of from_step and from_sample is set."""

    # Optimizer step of the run from which it holds.
    from_step: int | None = None
    # Sample of the run from which it holds.
    from_sample: int | None = None
    # As weights of the whole order.
    weights: dict[str, float] | None = None
    # As temperature of the whole order.
    temperature: float | None = None


@dataclass(frozen=True)
class OrderConfig:
    """The order in which a run reads a prepared corpus; its keys stand under `corpus` in the configuration of a run."""

    # The part of the corpus that is read, as the preparation has named it.
    split: str = "train"
    # Share of each source by its label, in tokens; null: by `temperature`.
    weights: dict[str, float] | None = None
    # Shares in proportion to size ** (1 / temperature): 1 is proportional, large is even; null: proportional.
    temperature: float | None = None
    # Passes over a source, by its label, after which it is left out and the others share its place; null: no caps.
    epoch_caps: dict[str, float] | None = None
    # Changes of the mixture during the run.
    phases: list[MixturePhaseConfig] = field(default_factory=list)
    # concatenate: documents one after another, cut at the end of each sample. best_fit: no document is cut that fits.
    packing: str = "concatenate"
    # Where the plan of packing=best_fit is kept; null: packing/ in the corpus folder.
    packing_directory: str | None = None
    # Shards that are read at a time: those of a pass are permuted and taken in windows of so many, samples permuted
    # inside a window. For a remote corpus larger than its cache; null: all samples permuted as a whole.
    window_shards: int | None = None


def validate_order(config: OrderConfig, prefix: str = "corpus") -> list[str]:
    """Every problem of an OrderConfig that shows without the corpus, one line each."""
    problems = []
    for source, weight in (config.weights or {}).items():
        if not weight >= 0:
            problems.append(f"{prefix}.weights.{source}: a share cannot be negative ({weight})")
    if config.weights is not None and not sum(config.weights.values()) > 0:
        problems.append(
            f"{prefix}.weights: at least one share must be positive; set it to null to use sources as they are"
        )
    for number, phase in enumerate(config.phases):
        starts = {"from_step": phase.from_step, "from_sample": phase.from_sample}
        problems += exactly_one(f"{prefix}.phases[{number}]", starts)
    problems += choice(f"{prefix}.packing", config.packing, PACKINGS)
    if config.packing != "best_fit" and config.packing_directory is not None:
        problems.append(
            f"{prefix}.packing_directory: only packing=best_fit keeps a plan ({config.packing_directory!r}); set it to "
            "null"
        )
    if config.window_shards is not None and config.packing != "concatenate":
        problems.append(
            f"{prefix}.window_shards: packing={config.packing} takes its samples from blocks of documents, not from "
            f"shards ({config.window_shards}); set it to null, or {prefix}.packing to concatenate"
        )
    return problems + at_least(f"{prefix}.window_shards", config.window_shards, 1)
