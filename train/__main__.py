"""`python -m train`: compose, validate, plan, build, train."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from typing import NoReturn

from conf.command_line import exit_code
from conf.lasting_output import lasting_output
from conf.slurm_variables import become_rank
from train.stop_requests import OUTSIDE_TRAINING, SIGNALS, SignalListener, answered_signals

HELP = """\
Train a model:  python -m train name=NAME corpus.directory=DIR training.total_tokens=N [key=value ...]
Several processes:  python -m torch.distributed.run --standalone --nproc-per-node=2 -m train ...

The run lives in runs/NAME. The same command started again resumes it from its newest whole checkpoint.
Begin with the weights of a run or model:  initialise_from=RUN@STEP     as a branch of a run:  resume_from=RUN@STEP
Choices (group=choice):
  model       xlstm_7b, xlstm_160m, neurips_125m_7_1, llama_160m, tiny, ...   (conf/model/)
  parallel    zero0, zero1, zero2, zero3      precision   bf16, fp32
  schedule    cosine, linear_to_zero, wsd, xlstm_7b_exponential, constant
  recipe, optimizer, checkpoint, evaluation, logging, alerts, experiment      (conf/<group>/)
A model brings the learning rate, schedule and batch of its recipe; what you give wins.
Every value can be set:  training.global_batch_size=512 optimizer.learning_rate=1e-3 ...   See docs/configuration.md.

  --plan            check and plan the run, print its whole configuration, and start nothing
  --config FILE     take every value from a run's config.yaml (or the run's directory); name=... and other
                    key=value go on top

Prepare a corpus first:  python -m data_pipeline prepare --help
"""


def main(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        return exit_code(lambda: _help(asked=bool(arguments)), (), "train: interrupted")
    become_rank()
    let_segments_grow()
    with (
        lasting_output() as output,
        SignalListener(answered_signals(), lambda number: OUTSIDE_TRAINING.answer(number, output)),
    ):
        return _train(arguments)


def let_segments_grow() -> None:
    """Before a GPU is used: blocks of its memory that PyTorch has asked for may grow, so that little is left unused
    between them. A 7B on two H200 otherwise runs out of memory with 35 GiB in pieces. What is set already stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _help(asked: bool) -> int:
    print(HELP, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _train(arguments: list[str]) -> int:
    # Importing torch takes seconds, which the help does without.
    from conf import ConfigError
    from train.command import compose_run, parse, show_plan
    from train.errors import UnfitDataError, last_words

    processes = int(os.environ.get("WORLD_SIZE", 1))
    try:
        command = parse(arguments)
        config = compose_run(command, processes)
        if command.plan:
            if os.environ.get("RANK", "0") == "0":
                show_plan(config, processes)
            return 0
        from train.run import train

        code = train(config)
        if code and processes > 1:
            # Peers may wait in a collective that this rank will not join; the launcher ends them, as soon as this
            # process is gone: no exit handler is waited for.
            os._exit(code)
        return code
    except UnfitDataError as error:
        print(last_words(error), file=sys.stderr)
        return 2
    except ConfigError as error:
        # Every rank finds the same problems; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"train: {error}", file=sys.stderr)
        return 2


def end_process(exit_code: int) -> NoReturn:
    """End without the interpreter's finalization: exit handlers run, output is written, then the process is gone.

    No thread is waited for; a run has finished its checkpoint before. Threads of torch's process groups live on, since
    DeepSpeed's globals hold the groups. One that lets go of a tensor while the interpreter is being finalized aborts
    the process (SIGABRT): a run that is complete would count as failed.
    """
    for number in SIGNALS:
        # Everything is done that a request could stop.
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    # Nobody may read it any more; a process started without one (`2>&-`) has None.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
