"""Runs of the real command lines, for tests of several folders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TextIO

from tests.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
# Seconds until a process that does not end is taken for one that hangs. No test is about speed: beside busy processes a
# command may take many times as long as alone.
PATIENCE = 900.0

# `python -m train` that stands still after a step.
PAUSED = ROOT / "tests" / "paused_train.py"

# A model of 60,000 parameters with both recurrences, for runs of seconds.
TINY_RUN = [
    "model=tiny",
    "model.vocab_size=384",
    "model.d_model=32",
    "model.n_blocks=3",
    "model.slstm_at=[1]",
    "model.ffn_dim=64",
    "model.mlstm.n_heads=2",
    "model.mlstm.reference_chunk_size=16",
    "model.slstm.n_heads=2",
    "schedule=cosine",
    "precision=fp32",
    "optimizer.learning_rate=1e-2",
    "training.sequence_length=32",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.cpu_threads=1",
    "corpus.max_epochs=1000",
    "evaluation.batch_size=4",
    "evaluation.interval=0",
    "evaluation.sets.validation.max_tokens=256",
    "checkpoint.interval=0",
    "logging.interval=1",
    "logging.monitor_interval=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
]


def environment() -> dict[str, str]:
    """The environment of child processes: one thread each, our packages first, no warnings about other libraries.

    Nor the developer's own settings of Weights & Biases.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def train_command(overrides: list[str], processes: int = 1, module: str = "train") -> list[str]:
    launcher = _torchrun(processes) if processes > 1 else []
    return [sys.executable, *launcher, "-m", module, *overrides]


def _torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def paused_train_command(step: int, go_on: Path, overrides: list[str], processes: int = 1) -> list[str]:
    """The command of a run that stands still after `step` until the file `go_on` exists."""
    return train_command([str(step), str(go_on), *overrides], processes, "tests.paused_train")


_SERVERS: list[ForkServer] = []


def run_train(
    overrides: list[str], processes: int = 1, timeout: float = PATIENCE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A run of `python -m train` from start to end: exit code and output. `variables`: see run_script."""
    return run_script(ROOT / "train" / "__main__.py", overrides, processes, timeout, **variables)


def run_script(
    script: Path, arguments: list[str], processes: int = 1, timeout: float = PATIENCE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A Python file, under torchrun where there are several processes, from start to end: exit code and output.

    `variables` of its environment: such as matter to no module that train.run imports.
    """
    command = [str(script), *arguments]
    server = fork_server()
    if server is not None:
        return server.run(command, processes, timeout, variables)
    launcher = _torchrun(processes) if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment() | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def prepared_corpus(folder: Path, texts: list[str], *overrides: str) -> Path:
    """A corpus of these documents under `folder`, of 320 ids, a tenth held out."""
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    arguments = [
        "data=text",
        f"data.path={folder / 'text'}",
        "data.split.validation_fraction=0.1",
        "tokenizer=sentencepiece_4k",
        "tokenizer.vocab_size=320",
        f"output={folder / 'corpus'}",
        *overrides,
    ]
    command = [sys.executable, "-m", "data_pipeline", "prepare", *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder / "corpus"


def fork_server() -> ForkServer | None:
    """The process of which runs are copies; None where they are not, but start anew."""
    variables = environment()
    # Another value with every test; what a run imports does not depend on it.
    variables.pop("PYTEST_CURRENT_TEST", None)
    # A process that sees a GPU has threads of its driver, which a copy would lack.
    if not _SERVERS and sys.platform == "linux" and not variables["CUDA_VISIBLE_DEVICES"]:
        _SERVERS.append(ForkServer(variables, ROOT))
    return _SERVERS[0] if _SERVERS and _SERVERS[0].suits(variables) else None


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port that no other process gets meanwhile, and that a server with SO_REUSEADDR, as torch's is, may take."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


@contextmanager
def closed_pipe() -> Iterator[TextIO]:
    """This process's standard error as a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    with redirect_stderr(stream):
        yield stream
    # What could not be written would fail once more.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, writer)
    os.close(nowhere)
    stream.close()
