"""What a sweep is: `python -m launch sweep plan sweep=NAME key=value`, with conf/sweep/NAME.yaml for its values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from conf.problems import at_least, choice, local_folder, positive
from launch.job import SubmitConfig, validate_machines
from train.estimate.calibration import shipped
from train.schedule import DECAY_SHAPES

# What a rule may depend on (`launch.sweep.sizes.Measures`).
MEASURES = ("parameters", "non_embedding", "d_model", "flops")
# Settings of a run that a sweep makes itself -> the key of the sweep to change in their place.
OWN_SETTINGS = {
    "name": "sweep.name",
    "run_root": "sweep.root",
    "seed": "sweep.seeds",
    "resume_from": "sweep.reuse",
    "initialise_from": "nothing: the runs of a sweep begin from their seeds",
    "training.total_steps": "sweep.budgets or sweep.tokens_per_parameter",
    "training.total_tokens": "sweep.budgets or sweep.tokens_per_parameter",
    "training.sequence_length": "sweep.contexts",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SizeConfig:
    """One size of the ladder: by `preset`, by `parameters`, or by `d_model` and `n_blocks`."""

    # A file of conf/model/, with everything that it and its recipe say; the model of the family is not used.
    preset: str | None = None
    # The width and depth that come nearest to so many parameters, embedding included (sweep.shape).
    parameters: float | None = None
    # Width of the residual stream.
    d_model: int | None = None
    # Number of blocks.
    n_blocks: int | None = None


@dataclass(frozen=True)
class ShapeConfig:
    """How the model of a family is made larger and smaller. Lists of block positions keep their share of the depth."""

    # d_model / n_blocks, for sizes by their number of parameters.
    aspect: float = 64.0
    # Width of a head, which sets the number of heads; null: as in the family's model.
    head_width: int | None = None
    # Inner width of feed-forward layers by d_model, rounded up to `multiple_of`; null: as in the family's model.
    feed_forward: float | None = None
    # Of d_model and of the inner width of feed-forward layers.
    multiple_of: int = 64


@dataclass(frozen=True)
class RuleConfig:
    """A value that depends on the size of a run: value * (measure / at)^exponent."""

    # What it is at `at`.
    value: float
    # parameters | non_embedding (those without embedding and head) | d_model | flops (of the whole run)
    by: str = "parameters"
    # In the unit of `by`.
    at: float = 1.0
    # 0: the same everywhere.
    exponent: float = 0.0
    # Not below; null: no limit.
    least: float | None = None
    # Not above; null: no limit.
    most: float | None = None


@dataclass(frozen=True)
class FamilyConfig:
    """A kind of model, at all sizes of the ladder."""

    # A file of conf/model/: the model that is made larger and smaller.
    model: str
    # Settings of all its runs, such as model.mlstm.gate=sigmoid.
    overrides: list[str] = field(default_factory=list)
    # Its sizes; [] : those of the sweep.
    sizes: list[SizeConfig] = field(default_factory=list)
    # null: that of the sweep.
    shape: ShapeConfig | None = None
    # null: that of the sweep.
    learning_rate: RuleConfig | None = None


@dataclass(frozen=True)
class ReuseConfig:
    """One long run at a constant rate for each size, and branches whose rate falls at the end of each budget.

    A branch is step by step the run with `schedule=wsd` of its length (arXiv 2405.18392), at the cost of its decay.
    """

    # Of each branch, the share of steps in which the rate falls.
    decay: float = 0.2
    # As `schedule.decay_shape`.
    decay_shape: str = "sqrt"
    # Steps of the warm-up, as a share of the shortest branch.
    warmup: float = 0.02


@dataclass(frozen=True)
class LargerConfig:
    """Nodes for models of so many parameters."""

    # From so many parameters on.
    parameters: float
    # In the place of `nodes`.
    nodes: int


@dataclass(frozen=True)
class SweepConfig:
    """Runs of every family, size, context, seed and budget, each a row of the sweep's manifest."""

    # The sweep lies in <root>/<name>.
    name: str
    # A folder for sweeps.
    root: str
    # Settings of all runs, such as corpus.directory=DIR; those of the command come behind.
    base: list[str]
    # By names of your own, which the table of runs has.
    families: dict[str, FamilyConfig]
    # The ladder.
    sizes: list[SizeConfig]
    shape: ShapeConfig
    # Training FLOPs of the IsoFLOP curves, counted exactly.
    budgets: list[float]
    # Lengths in tokens for each parameter, beside the budgets.
    tokens_per_parameter: list[float]
    # Runs of a budget that would have fewer tokens for each parameter are left out; null: none.
    least_tokens_per_parameter: float | None
    # Runs of a budget that would have more are left out; null: none.
    most_tokens_per_parameter: float | None
    # Tokens of a training sequence.
    contexts: list[int]
    # Every run with each of them.
    seeds: list[int]
    # Peak rate; null: that of the recipe.
    learning_rate: RuleConfig | None
    # Tokens of a step, rounded to whole samples that divide among the processes; null: the batch of the recipe.
    batch_tokens: RuleConfig | None
    # Tokens of one pass of a rank at most, which sets training.micro_batch_size; null: that of the recipe.
    micro_batch_tokens: int | None
    # A run of fewer is refused: rounding to whole steps would change its budget.
    least_steps: int
    # A run whose warm-up takes a greater share of its steps is refused: it bends the curves.
    longest_warmup: float
    # null: every run is trained from its beginning.
    reuse: ReuseConfig | None
    # More nodes for larger models, beside `nodes`.
    larger: list[LargerConfig]
    # What kind of GPU the runs are for: their hours are predicted by its calibration (train/estimate/calibrations).
    # null: they are not predicted; nor are those of runs in fp32.
    gpu: str | None


@dataclass(frozen=True)
class SweepPlanConfig(SubmitConfig):
    """A sweep, and the machines of each of its runs."""

    sweep: SweepConfig


def validate_sweep(config: SweepPlanConfig) -> list[str]:
    """All problems of a sweep that show without its runs, one line each."""
    sweep = config.sweep
    problems = [
        *validate_machines(config),
        *local_folder("sweep.root", sweep.root),
        *_names("sweep.name", [sweep.name]),
        *_names("sweep.families", list(sweep.families)),
        *at_least("sweep.least_steps", sweep.least_steps, 1),
        *at_least("sweep.micro_batch_tokens", sweep.micro_batch_tokens, 1),
    ]
    if sweep.gpu is not None:
        problems += choice("sweep.gpu", sweep.gpu, shipped(), "calibration")
    if config.launch.continuation != "requeue":
        problems.append(
            f"launch.continuation: {config.launch.continuation} is for single runs; use requeue, or --no-requeue in "
            "launch.options, and submit the sweep again: runs that are not complete are sent once more"
        )
    for key, values in (("contexts", sweep.contexts), ("seeds", sweep.seeds), ("families", sweep.families)):
        if not values:
            problems.append(f"sweep.{key}: empty, so there are no runs; name at least one")
    if not sweep.budgets and not sweep.tokens_per_parameter:
        problems.append("sweep.budgets: none, and no sweep.tokens_per_parameter either; give one of them a value")
    for key in ("budgets", "tokens_per_parameter"):
        problems += [problem for value in getattr(sweep, key) for problem in positive(f"sweep.{key}", value)]
    for key in ("budgets", "tokens_per_parameter", "contexts", "seeds"):
        values = getattr(sweep, key)
        problems += [
            f"sweep.{key}: {value:g} is there twice" for value in dict.fromkeys(values) if values.count(value) > 1
        ]
    problems += [problem for context in sweep.contexts for problem in at_least("sweep.contexts", context, 1)]
    if not 0 <= sweep.longest_warmup <= 1:
        problems.append(f"sweep.longest_warmup: must be a share, 0 to 1 ({sweep.longest_warmup})")
    for number, larger in enumerate(sweep.larger):
        problems += at_least(f"sweep.larger[{number}].nodes", larger.nodes, 1)
    return problems + list(_of_families(sweep)) + list(_of_rules(sweep))


def _names(key: str, names: list[str]) -> list[str]:
    return [
        f"{key}: becomes the name of a folder; use letters, digits, _, - and . ({name!r})"
        for name in names
        if not _NAME.fullmatch(name)
    ]


def _of_families(sweep: SweepConfig) -> Iterator[str]:
    for name, family in sweep.families.items():
        key = f"sweep.families.{name}"
        if not family.sizes and not sweep.sizes:
            yield f"{key}.sizes: none, and no sweep.sizes either; give one of them sizes"
        yield from _of_sizes(f"{key}.sizes", family.sizes)
        yield from owned_settings(f"{key}.overrides", family.overrides, sweep)
        if family.shape is not None:
            yield from _of_shape(f"{key}.shape", family.shape)
    yield from _of_sizes("sweep.sizes", sweep.sizes)
    yield from owned_settings("sweep.base", sweep.base, sweep)
    yield from _of_shape("sweep.shape", sweep.shape)


def _of_sizes(key: str, sizes: list[SizeConfig]) -> Iterator[str]:
    for number, size in enumerate(sizes):
        given = [size.preset is not None, size.parameters is not None, (size.d_model or size.n_blocks) is not None]
        if sum(given) != 1 or (size.d_model is None) != (size.n_blocks is None):
            yield f"{key}[{number}]: give preset, or parameters, or d_model and n_blocks ({size})"
            continue
        yield from at_least(f"{key}[{number}].parameters", size.parameters, 1)
        yield from at_least(f"{key}[{number}].d_model", size.d_model, 1)
        yield from at_least(f"{key}[{number}].n_blocks", size.n_blocks, 1)


def _of_shape(key: str, shape: ShapeConfig) -> Iterator[str]:
    yield from positive(f"{key}.aspect", shape.aspect)
    yield from at_least(f"{key}.head_width", shape.head_width, 1)
    yield from at_least(f"{key}.multiple_of", shape.multiple_of, 1)
    if shape.feed_forward is not None:
        yield from positive(f"{key}.feed_forward", shape.feed_forward)


def owned_settings(key: str, settings: list[str], sweep: SweepConfig) -> Iterator[str]:
    """Those of `settings` that the sweep makes itself, one line each."""
    for setting in settings:
        name = setting.lstrip("+~").partition("=")[0]
        if name in OWN_SETTINGS:
            yield f"{key}: {setting} is made by the sweep; change {OWN_SETTINGS[name]}"
        elif sweep.reuse is not None and name.partition(".")[0] == "schedule":
            yield f"{key}: {setting} does not go with sweep.reuse, which makes the schedule"
        elif sweep.learning_rate is not None and name == "optimizer.learning_rate":
            yield f"{key}: {setting} does not go with sweep.learning_rate; change that, or set it to null"
        elif sweep.batch_tokens is not None and name == "training.global_batch_size":
            yield f"{key}: {setting} does not go with sweep.batch_tokens; change that, or set it to null"
        elif sweep.micro_batch_tokens is not None and name == "training.micro_batch_size":
            yield f"{key}: {setting} does not go with sweep.micro_batch_tokens; change that, or set it to null"


def _of_rules(sweep: SweepConfig) -> Iterator[str]:
    rules = {"sweep.learning_rate": sweep.learning_rate, "sweep.batch_tokens": sweep.batch_tokens}
    rules |= {f"sweep.families.{name}.learning_rate": family.learning_rate for name, family in sweep.families.items()}
    for key, rule in rules.items():
        if rule is None:
            continue
        yield from positive(f"{key}.value", rule.value)
        yield from positive(f"{key}.at", rule.at)
        yield from choice(f"{key}.by", rule.by, MEASURES)
        if rule.least is not None and rule.most is not None and rule.least > rule.most:
            yield f"{key}.least: {rule.least:g} is more than {key}.most={rule.most:g}"
        if sweep.reuse is not None and rule.by == "flops":
            yield (
                f"{key}.by: flops differ between the branches of one run, whose rate and batch are the same; use "
                "another measure, or sweep.reuse=null"
            )
    reuse = sweep.reuse
    if reuse is None:
        return
    yield from choice("sweep.reuse.decay_shape", reuse.decay_shape, DECAY_SHAPES)
    for name in ("decay", "warmup"):
        if not 0 < getattr(reuse, name) < 1:
            yield f"sweep.reuse.{name}: must be a share between 0 and 1 ({getattr(reuse, name)})"
