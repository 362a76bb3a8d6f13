"""The configuration of a run, as data. `conf/train.yaml` and its groups hold the values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data_pipeline.network import NetworkConfig
from data_pipeline.ordering.config import OrderConfig
from data_pipeline.sources.config import DataConfig
from data_pipeline.tasks.config import TaskConfig
from data_pipeline.tokenizing.config import TokenizerConfig
from model.accounting import count_parameters
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.config import ModelConfig
from train.alert_rules import AlertsConfig
from train.health.config import HealthConfig
from train.optimizer import OptimizerConfig
from train.schedule import ScheduleConfig


@dataclass(frozen=True)
class TrainingConfig:
    """How much is trained, and in what pieces."""

    # Tokens that one sample feeds to the model.
    sequence_length: int = 2048
    # Samples of one optimizer step, over all ranks.
    global_batch_size: int = 256
    # Samples of one forward and backward pass on one rank.
    micro_batch_size: int = 8
    # Length of the run: exactly one of the two is set. Tokens are rounded up to whole steps.
    total_steps: int | None = None
    # The same in tokens: the run ends with the first step that reaches it, whatever its batches were before a resume.
    total_tokens: int | None = None
    # Adds this times logsumexp(logits)^2 to the loss of every token in training, not in evaluation; PaLM has 1e-4.
    z_loss_weight: float = 0.0
    # Train each micro-batch so many tokens of its samples at a time, exactly and in the activation memory of that many,
    # for at most one more forward pass; null: all tokens at once. With parallel.pipeline the stages wait less for each
    # other, run nothing twice, and have the activations of a whole micro-batch in memory.
    time_chunk: int | None = None
    # Go on with the documents: each row of a batch begins with the state behind its row of the step before (truncated
    # backpropagation through time). Needs corpus.packing=concatenate.
    carry_state: bool = False
    # Consecutive windows of sequence_length tokens that a row reads before it goes on elsewhere, when state is carried.
    carry_windows: int = 32
    # Train through blocks that torch.compile has made: faster, the same to rounding, minutes at the first start on a
    # machine. null: on GPUs.
    compile: bool | None = None
    # Also record the launches of compiled blocks as CUDA graphs and play them, for models so small that the GPU would
    # wait for the host. null: below 1e9 parameters where it can be, with ZeRO-1 in bf16 and nothing recomputed.
    cuda_graphs: bool | None = None
    # On GPUs: compare the kernels with their references before the first step, and refuse to train where they disagree.
    kernel_preflight: bool = True
    # Non-finite steps that a run may skip before it stops.
    max_skipped_steps: int = 20
    # Samples that no step reads, as windows of the run's order: [[first, count], ...], such as those of a step that an
    # event names. A step that would read any of them begins behind the window. What lies behind the run's position
    # changes nothing.
    skip_samples: list[list[int]] = field(default_factory=list)
    # Processes of the run that compute on one host when there is no GPU; threads of each (null: torch's choice).
    cpu_threads: int | None = None


# Below so many the blocks of a model are computed faster than a host launches them (measured on an H200: at 0.4e9 they
# are, at 1.4e9 they are not).
HOST_BOUND_PARAMETERS = 1_000_000_000

# What matrix products are computed in, by the name that a configuration gives it.
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = tuple(_DTYPES)


@dataclass(frozen=True)
class LiveConfig:
    """Text that is tokenized while the run reads it, instead of a prepared corpus."""

    # As `python -m data_pipeline prepare` takes them; tokenizer.kind is "file".
    data: DataConfig
    tokenizer: TokenizerConfig


@dataclass(frozen=True)
class CorpusConfig(OrderConfig):
    """The prepared corpus (`python -m data_pipeline prepare`) that the run reads, and in which order."""

    # A folder, or a URL of any file system that fsspec knows.
    directory: str | None = "???"
    # Text to tokenize while the run reads it, when nothing is prepared (then directory is null).
    live: LiveConfig | None = None
    # A synthetic task whose examples are made while the run goes on (then directory is null).
    task: TaskConfig | None = None
    # Where the shards of a corpus at a URL (s3://..., gs://...) are kept on this machine.
    cache_directory: str | None = None
    # GiB that all corpora in cache_directory may take together.
    cache_gib: float = 100.0
    # Passes over a source that the run may make before it is refused.
    max_epochs: float = 4.0
    # A damaged or missing shard ends the run (fail), or its samples have no targets and are logged (skip).
    on_corrupt: str = "fail"
    # Optimizer steps that each rank reads ahead.
    prefetch_steps: int = 2
    # Threads of each rank that read ahead.
    workers: int = 1
    # A corpus at a URL, and live text that comes over a network.
    network: NetworkConfig = field(default_factory=NetworkConfig)
    # Why a checkpoint may be resumed on other data than it was trained on, for events.jsonl; null: it is refused.
    allow_changed_data: str | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is laid out over processes."""

    # DeepSpeed ZeRO: 0 replicates all, 1 shards the optimizer, 2 also gradients, 3 also weights.
    zero_stage: int = 1
    # What is recomputed in the backward pass: none, unit (each residual half of a block by itself) or block.
    activation_checkpointing: str = "none"
    # Stages that the blocks are cut into: each process holds one and passes its outputs on; ZeRO stages 0 and 1.
    pipeline: int = 1
    # Processes that share each sample, with an equal slice of its tokens each.
    sequence: int = 1
    # How they pass on the mLSTM's state: auto, all_gather, recursive_doubling or ring.
    sequence_exchange: str = "auto"
    # Seconds after which a collective that does not finish ends the run.
    collective_timeout_seconds: int = 1800


@dataclass(frozen=True)
class PrecisionConfig:
    """bf16: matrix products in bf16, master weights, moments, gates, norms and loss in fp32. fp32: everything."""

    # bf16 or fp32.
    compute: str = "bf16"

    @property
    def is_bf16(self) -> bool:
        """Whether matrix products are less precise than the weights' fp32 copies."""
        return self.compute_dtype is torch.bfloat16

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return _DTYPES[self.compute]

    def uses_autocast(self, zero_stage: int) -> bool:
        """Whether weights stay fp32 and products cast them. Without sharding there is no second, fp32 copy."""
        return self.is_bf16 and zero_stage == 0

    def weight_dtype(self, zero_stage: int) -> torch.dtype:
        """The dtype of the weights that a forward pass reads."""
        return torch.float32 if self.uses_autocast(zero_stage) else self.compute_dtype


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    # Steps between checkpoints; 0: only at the end of the run.
    interval: int = 1000
    # How many of the newest are kept.
    keep_last: int = 3
    # Checkpoints in a row that may fail to be written, each tried again after twice as many steps, before the run ends.
    max_failed_saves: int = 8
    # Checkpoints at multiples of this step are kept for good; null: none.
    keep_every: int | None = None
    # Steps after each of which one is written, whatever the interval says, and kept for good, such as those from which
    # branches are to begin.
    keep_at: list[int] = field(default_factory=list)
    # A held-out set (<set> or <set>/<source>): of the checkpoints at whose step it was scored, the one with the lowest
    # loss is kept until a better one is; null: none.
    keep_best: str | None = None
    # Write one where the last phase of the schedule begins (the decay of wsd, a cooldown), and keep it for good: from
    # there a run can be extended or branched.
    keep_before_decay: bool = True
    # A damaged or unreadable checkpoint is passed over, named in the log and the events, and the one before is taken
    # (skip), or it ends the run (fail). One of a later version is refused in either case.
    on_corrupt: str = "skip"
    # A second place for checkpoints, a path or a URL of any file system that fsspec knows: each is copied there in the
    # background, to <mirror>/<name>/checkpoints, and a start takes one from there that is newer than the run's own.
    # null: none.
    mirror: str | None = None
    # How many of the newest are kept there; others stay by the same rules as in the run's folder. null: keep_last.
    mirror_keep_last: int | None = None
    # Seconds that the end of a run waits for the last copy.
    mirror_seconds: float = 600.0


@dataclass(frozen=True)
class EvaluationSetConfig:
    """One held-out set."""

    # The part of the corpus that is scored.
    split: str = "validation"
    # Another prepared corpus than the run's; null: the run's own.
    directory: str | None = None
    # One source label of the split; null: all.
    source: str | None = None
    # Tokens scored at most: the first ones of the split, whose sources follow one another by name; with by_source of
    # each source, and the loss of the set weighs each by its tokens in the whole split. null: all.
    max_tokens: int | None = None
    # Also report each source of the split, as <set>/<source>.
    by_source: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """When held-out text is scored, and which."""

    # Steps between evaluations; 0: only at the end of the run.
    interval: int = 1000
    # Samples of one forward pass on one rank.
    batch_size: int = 8
    # The sets, under names of your own.
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    # auto: what WANDB_MODE says, else online when WANDB_API_KEY is set, else offline. offline | online | disabled.
    mode: str = "auto"
    # The project at W&B that the run belongs to.
    project: str = "xlstm-pretrain"
    # User or team that owns the project; null: W&B's default for the account.
    entity: str | None = None
    # Labels of the run at W&B.
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SamplesConfig:
    """Text that the model writes while it is trained."""

    # Steps between samples; 0: never.
    interval: int = 0
    # Texts to continue; an empty one: a document is begun.
    prompts: list[str] = field(default_factory=lambda: [""])
    # Tokens of each sample.
    max_new_tokens: int = 100
    # 0: always the most likely token.
    temperature: float = 0.8
    # Draw from the k most likely tokens only; null: from all.
    top_k: int | None = None
    # Draw from the most likely tokens that together have this probability.
    top_p: float = 0.95
    # Of the draws: the same at every step.
    seed: int = 0


@dataclass(frozen=True)
class LoggingConfig:
    """What a run records, and how often."""

    # Steps between lines in metrics.jsonl.
    interval: int = 10
    # Steps between stability statistics of every layer; 0: never.
    monitor_interval: int = 100
    # A gradient norm or loss of more than this times its running median is logged as a spike.
    spike_factor: float = 4.0
    # Show a progress bar on a terminal, and lines elsewhere.
    progress: bool = True
    # Also write the figures of metrics.jsonl as tables, csv/train.csv and others in the run's folder.
    csv: bool = False
    # Also write the figures for TensorBoard, to tensorboard/ in the run's folder.
    tensorboard: bool = False
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class NumbersConfig:
    """What a run does about bad steps, which are not finite, and about processes that hold other weights than they
    should."""

    # So many bad steps among the last numbers.window take the run back to the newest checkpoint before the first of
    # them, and it leaves out the samples that it has read since; null: never.
    bad_steps: int | None = 5
    # Steps that the run looks back on for it.
    window: int = 100
    # Spikes (logging.spike_factor) count as bad steps too.
    count_spikes: bool = False
    # Times that a run may go back so; where it would do so once more, it ends.
    max_rollbacks: int = 3
    # Steps between comparisons of the weights that several processes hold alike, bit for bit; 0: never.
    compare_interval: int = 1000
    # Compare also the gradients of those steps; with parallel.zero_stage=0, where every process has all of them.
    compare_gradients: bool = False


@dataclass(frozen=True)
class PreemptionConfig:
    """What a run does that is asked to stop."""

    # Seconds from the request (a signal) to the moment at which the process is killed, such as the grace time of a
    # scheduler. A checkpoint that would not be written by then is left out. null: not known; a Slurm job goes by the
    # end of its time.
    seconds_left: float | None = None


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run ends because one of its processes does not go on."""

    # Seconds that a process may stay in one phase of a step (data, forward, backward, reduce, step, evaluate) before
    # the run ends and names it; null: never. Starting, saving, sampling and the first phase of each kind, which
    # compiles, may take parallel.collective_timeout_seconds.
    seconds: float | None = 120.0


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    # The run's folder is <run_root>/<name>; the same name started again resumes.
    name: str = "???"
    # Folder of all runs.
    run_root: str = "runs"
    # Of initial weights, of the order of samples and of every rank's random generators.
    seed: int = 0
    # Begin with the weights of a run, RUN@STEP, a checkpoint, a weights directory or a Hugging Face directory; the
    # optimizer, the schedule and the data begin anew.
    initialise_from: str | None = None
    # Begin as a branch of another run (RUN@STEP, RUN or a checkpoint): optimizer, counters, schedule and place in the
    # data go on. A run that has checkpoints of its own goes on from those.
    resume_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    numbers: NumbersConfig = field(default_factory=NumbersConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)

    def execution(self, device_type: str) -> str:
        """How blocks run in passes that train on such devices, of model.compilation."""
        compiles = self.training.compile
        if compiles is None:
            compiles = device_type == "cuda"
        if not compiles:
            return WRITTEN
        captures = self.training.cuda_graphs
        if captures is None:
            is_small = count_parameters(self.model).total < HOST_BOUND_PARAMETERS
            captures = device_type == "cuda" and is_small and not self.reasons_not_to_capture()
        return CAPTURED if captures else COMPILED

    def reasons_not_to_capture(self) -> list[str]:
        """Settings with which blocks cannot be played from CUDA graphs, each with its reason."""
        training, parallel = self.training, self.parallel
        in_use = "keeps what blocks put out for later passes"
        return [
            f"{key}={value} {reason}"
            for key, value, reason, is_so in (
                ("training.compile", "false", "compiles no blocks", training.compile is False),
                ("training.time_chunk", training.time_chunk, in_use, training.time_chunk is not None),
                ("training.carry_state", "true", in_use, training.carry_state),
                ("parallel.pipeline", parallel.pipeline, in_use, parallel.pipeline > 1),
                ("parallel.sequence", parallel.sequence, "exchanges in the middle of blocks", parallel.sequence > 1),
                ("parallel.zero_stage", parallel.zero_stage, "reads gradients late", parallel.zero_stage != 1),
                ("precision.compute", self.precision.compute, "reads gradients late", not self.precision.is_bf16),
                (
                    "parallel.activation_checkpointing",
                    parallel.activation_checkpointing,
                    "runs blocks a second time",
                    parallel.activation_checkpointing != "none",
                ),
            )
            if is_so
        ]

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Windows of the order that no step reads: first sample, how many."""
        return [(first, count) for first, count in self.training.skip_samples]

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run that has this configuration from its first step on (`train.length`: of any)."""
        if self.training.total_steps is not None:
            return self.training.total_steps
        assert self.training.total_tokens is not None, "validate() wants one of the two"
        return -(-self.training.total_tokens // self.tokens_per_step)
