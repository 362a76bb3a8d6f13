"""Every impossible combination is named before any work starts, by the function and by the command line."""

import pytest

from conf import compose
from tests.runs import run_train
from train.config import RunConfig
from train.validate import validate

BASE = ["name=x", "corpus.directory=y", "training.total_steps=100", "recipe=none"]


def problems(*overrides, world_size=2):
    return validate(compose(RunConfig, "train", [*BASE, *overrides]), world_size)


def test_a_sound_configuration_has_no_problem():
    assert problems() == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.global_batch_size=30"], "training.global_batch_size: 30 samples do not divide into passes of 8"),
        (["training.global_batch_size=30"], "use training.global_batch_size=32 or training.micro_batch_size=5"),
        (["name="], "name: empty, so the run's folder would be run_root itself; give the run a name"),
        (["training.total_tokens=5"], "set exactly one of total_steps (100) and total_tokens (5)"),
        (["training.total_steps=null"], "none of total_steps and total_tokens is set; set one of them"),
        (["training.time_chunk=0"], "training.time_chunk: must be at least 1 (0)"),
        (
            ["training.time_chunk=512", "parallel.sequence=2"],
            "training.time_chunk: chunks in time (512 tokens) are trained one after another by one rank, and "
            "parallel.sequence=2 ranks share each sample; set training.time_chunk=null or parallel.sequence=1",
        ),
        (
            ["training.carry_state=true", "parallel.pipeline=2"],
            "training.carry_state: the state of a row belongs to one rank, and parallel.pipeline=2 stages share each "
            "row; set parallel.pipeline=1",
        ),
        (["training.carry_windows=0"], "training.carry_windows: must be at least 1 (0)"),
        (
            ["training.carry_state=true", "corpus.packing=best_fit"],
            "training.carry_state: corpus.packing=best_fit puts documents into samples of their own, which do not go "
            "on; set corpus.packing=concatenate",
        ),
        (
            ["training.carry_state=true", "parallel.sequence=2"],
            "training.carry_state: the state of a row belongs to one rank, and parallel.sequence=2 ranks share each "
            "row; set parallel.sequence=1",
        ),
        (
            ["training.carry_state=true", "model=hybrid_160m"],
            "training.carry_state: attention blocks carry all earlier tokens, more with every step; train without "
            "them, or with training.carry_state=false",
        ),
        (
            ["training.carry_state=true", "model=llama_160m"],
            "training.carry_state: attention blocks carry all earlier tokens, more with every step; train without "
            "them, or with training.carry_state=false",
        ),
        (
            ["training.carry_state=true", "corpus.phases=[{from_step: 50, temperature: 2}]"],
            "corpus.phases[0].from_step: rows go on for training.carry_windows=32 steps, so a mixture changes at a "
            "multiple of 32 only (50); use 64",
        ),
        (
            ["training.carry_state=true", "corpus.phases=[{from_sample: 8191, temperature: 2}]"],
            "corpus.phases[0].from_sample: rows go on for training.carry_windows=32 steps, so a mixture changes at a "
            "multiple of 8192 only (8191); use 8192",
        ),
        (["training.sequence_length=0"], "training.sequence_length: must be at least 1 (0)"),
        (["training.z_loss_weight=-1e-4"], "training.z_loss_weight: must be 0 (no z-loss) or positive (-0.0001)"),
        (["training.cpu_threads=0"], "training.cpu_threads: must be at least 1 or null (0)"),
        (["parallel.zero_stage=4"], "parallel.zero_stage: no such choice (4); choose one of 0, 1, 2, 3"),
        (["parallel.activation_checkpointing=all"], "choose one of none, unit, block"),
        (["parallel.sequence=0"], "parallel.sequence: must be at least 1 (0)"),
        (
            ["parallel.sequence=3"],
            "parallel.sequence: 2 processes do not divide into groups of 3 that share a sequence; start a multiple of "
            "3, or choose a divisor of 2",
        ),
        (
            ["parallel.sequence=2", "training.sequence_length=2049"],
            "training.sequence_length: 2049 tokens do not divide into 2 equal slices (parallel.sequence); use "
            "training.sequence_length=2048",
        ),
        (
            ["parallel.sequence=2", "model=tiny", "model.slstm_at=[1]", "model.slstm.n_heads=1"],
            "parallel.sequence: model.slstm.n_heads=1 heads do not divide among 2 sequence ranks; choose",
        ),
        (
            ["parallel.sequence=2", "model=tiny_neurips", "training.sequence_length=4"],
            "parallel.sequence: mlstm blocks look 3 tokens back, and a slice has 2; use at most 1 ranks or longer",
        ),
        (["parallel.pipeline=0"], "parallel.pipeline: must be at least 1 (0)"),
        (
            ["parallel.pipeline=3"],
            "parallel.pipeline: 2 processes do not divide into replicas of 3 stages; start a multiple of 3, or choose",
        ),
        (
            ["parallel.pipeline=2", "parallel.sequence=2"],
            "2 processes do not divide into replicas of 2 stages x 2 sequence ranks (parallel.sequence); start a "
            "multiple of 4, or choose fewer stages",
        ),
        (
            ["parallel.pipeline=2", "model=tiny", "model.n_blocks=1", "model.slstm_at=[]"],
            "parallel.pipeline: 2 stages are more than the model's 1 blocks (model.n_blocks), of which each stage "
            "takes at least one; use at most 1",
        ),
        *(
            (
                ["parallel.pipeline=2", f"parallel=zero{stage}"],
                f"parallel.zero_stage: {stage} cuts gradients or weights at every micro-batch, which the stages of "
                "parallel.pipeline=2 do not take; use parallel.zero_stage=1, or parallel.pipeline=1",
            )
            for stage in (2, 3)
        ),
        (["parallel.sequence_exchange=tree"], "choose one of auto, all_gather, recursive_doubling, ring"),
        (["precision.compute=fp16"], "precision.compute: no such choice ('fp16'); choose one of bf16, fp32"),
        (["model.mlstm.n_heads=7"], "model.mlstm.n_heads"),
        (["model.slstm_at=[3]"], "model.slstm"),
        (["schedule.decay=1000", "schedule.kind=nonsense"], "schedule.kind"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last: must be at least 1 (0)"),
        (["logging.spike_factor=1"], "logging.spike_factor: must be above 1"),
        (["logging.wandb.mode=maybe"], "logging.wandb.mode: no such choice ('maybe')"),
        (["logging.wandb.project=a/b"], "logging.wandb.project: W&B allows none of / \\ # ? % : and line ends in it"),
        (["logging.wandb.project="], "logging.wandb.project: empty, or with space at an end (''); give a name"),
        (["logging.wandb.entity="], "logging.wandb.entity: empty, or with space at an end (''); give a name"),
        (["logging.wandb.entity=a/b"], "logging.wandb.entity: W&B allows none of"),
        (["logging.wandb.tags=[a,'']"], "logging.wandb.tags[1]: must be between 1 and 64 characters (0)"),
        (["+corpus.weights={a: -1.0}"], "corpus.weights.a: a share cannot be negative (-1.0)"),
        (["corpus.max_epochs=0"], "corpus.max_epochs: must be positive"),
        (["corpus.phases=[{from_step: 3, from_sample: 5}]"], "corpus.phases[0]: set exactly one of from_step (3) and"),
        (["corpus.packing=first_fit"], "corpus.packing: no such choice ('first_fit'); choose one of concatenate"),
        (["corpus.packing_directory=x"], "corpus.packing_directory: only packing=best_fit keeps a plan ('x')"),
        (["corpus.on_corrupt=ignore"], "corpus.on_corrupt: no such choice ('ignore'); choose one of fail, skip"),
        (["corpus.directory=s3://b/c"], "corpus.cache_directory: a corpus at a URL (s3://b/c) is read through a cache"),
        (["corpus.cache_gib=0"], "corpus.cache_gib: must be positive (0.0)"),
        (["corpus.window_shards=0"], "corpus.window_shards: must be at least 1 (0)"),
        (
            ["corpus.window_shards=4", "corpus.packing=best_fit"],
            "corpus.window_shards: packing=best_fit takes its samples from blocks of documents, not from shards (4)",
        ),
        (["corpus.workers=0"], "corpus.workers: must be at least 1 (0)"),
        (["corpus.allow_changed_data=' '"], "corpus.allow_changed_data: empty; give the reason"),
        (
            ["evaluation.sets.validation.by_source=true", "evaluation.sets.validation.source=a"],
            "evaluation.sets.validation.by_source: the set is one source already (a)",
        ),
        (["evaluation.sets.validation.max_tokens=0"], "evaluation.sets.validation.max_tokens: must be at least 1 (0)"),
    ],
)
def test_each_impossible_value_has_its_message(overrides, message):
    assert any(message in line for line in problems(*overrides)), problems(*overrides)


def test_all_problems_come_at_once():
    found = problems("model.mlstm.n_heads=7", "parallel.zero_stage=9", "precision.compute=fp8", "optimizer.eps=0")
    assert len(found) >= 4


@pytest.mark.slow
def test_the_command_line_exits_2_with_every_problem_and_makes_no_folder(tmp_path):
    arguments = ["name=bad", f"run_root={tmp_path}", "corpus.directory=nowhere", "training.total_steps=3"]
    done = run_train([*arguments, "model.mlstm.n_heads=7", "training.global_batch_size=7"])
    assert done.returncode == 2
    assert "model.mlstm.n_heads" in done.stderr and "training.global_batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_a_missing_corpus_exits_2_and_says_how_to_make_one(tmp_path):
    arguments = ["name=bad", f"run_root={tmp_path}", "model=tiny", "training.total_steps=3"]
    done = run_train([*arguments, f"corpus.directory={tmp_path}/no"])
    assert done.returncode == 2
    assert str(tmp_path / "no") in done.stderr and "prepare" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_does_not_fit_the_corpus_exits_2(tiny_run):
    changes = [
        "model.vocab_size=64",
        "corpus.split=train",
        "+corpus.weights.books=1.0",
        "evaluation.sets.validation.split=exam",
        "training.total_steps=3",
    ]
    done = run_train([*tiny_run, *changes])
    assert done.returncode == 2
    assert "model.vocab_size: 64 is less than the 320 token ids" in done.stderr
    assert "corpus.weights.books: the corpus has no such source; it has" in done.stderr
    assert "evaluation.sets.validation.split: no split 'exam'" in done.stderr

    too_long = run_train([*tiny_run, "training.total_steps=100000", "corpus.max_epochs=2"])
    assert too_long.returncode == 2
    assert "corpus.max_epochs: the run reads source" in too_long.stderr


def test_help_is_for_newcomers():
    done = run_train(["--help"])
    assert done.returncode == 0
    assert "python -m data_pipeline prepare" in done.stdout and "resumes" in done.stdout
