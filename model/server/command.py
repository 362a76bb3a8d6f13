"""`python -m model serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from conf import ConfigError
from conf.problems import at_least, between
from model.command_settings import device_named, dtype_named, read_settings, tokenizer_path
from model.server.limits import Limits

# These libraries are an extra, and PyTorch takes a while to import.
if TYPE_CHECKING:
    from model.server.service import Service
    from model.server.worker import BatchWorker

SERVE_HELP = """\
Answer requests in the form of OpenAI's interface: /v1/completions, /v1/chat/completions, /v1/models; also /health,
/metrics for Prometheus, and a page to try it at /. Needs the extra "serve": pip install ".[serve]".

  checkpoint=NAME               a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint, a weights
                                directory or a Hugging Face directory
  tokenizer=PATH                a tokenizer file or folder; null (default): the run's own
  name=null                     of the model in requests; null (default): the last part of the checkpoint's name
  host=127.0.0.1                who is not on this machine cannot ask; 0.0.0.0: anyone who reaches it, unchecked
  port=8000                     0: any that is free
  slots=8                       sequences that are continued at the same time
  queue=64                      sequences that wait for a slot; more are refused (429)
  max_prompt_tokens=32768       of one prompt; longer ones are refused (400)
  max_new_tokens=4096           of one continuation
  max_body_bytes=1048576        of a request; longer ones are refused (413)
  connections=512               requests that are received, computed or sent at a time; more are refused (429)
  stall_seconds=30              a client that takes or sends nothing for so long is given up
  drain_seconds=30              after SIGTERM running answers may take so long, while new requests are refused (503)
  prefill_tokens=512            of a prompt, read between two steps of those that are being continued
  prefix_cache_mib=0            for states of prompts' beginnings, which others that begin alike need not read again
  device=null                   null (default): the GPU where there is one
  dtype=null                    bfloat16 | float32; null (default): bfloat16 on a GPU, else float32

example:
  python -m model serve checkpoint=runs/first port=8000
"""
# What the extra "serve" installs.
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


@dataclass(frozen=True)
class ServeSettings:
    checkpoint: str = "???"
    tokenizer: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = Limits.slots
    queue: int = Limits.queue
    max_prompt_tokens: int = Limits.max_prompt_tokens
    max_new_tokens: int = Limits.max_new_tokens
    max_body_bytes: int = Limits.max_body_bytes
    connections: int = Limits.connections
    stall_seconds: float = Limits.stall_seconds
    drain_seconds: float = Limits.drain_seconds
    prefill_tokens: int = 512
    prefix_cache_mib: int = 0
    device: str | None = None
    dtype: str | None = None

    @property
    def limits(self) -> Limits:
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        found = self.limits.problems() + between("port", self.port, 0, 65535)
        if self.name is not None and not self.name.strip():
            found.append("name: must not be empty; give one, or null")
        return (
            found
            + at_least("prefill_tokens", self.prefill_tokens, 1)
            + at_least("prefix_cache_mib", self.prefix_cache_mib, 0)
        )


def serve(arguments: list[str]) -> int:
    """Run the command with its KEY=VALUE arguments; returns the exit code. Raises ConfigError, and as `load` does."""
    settings = read_settings(ServeSettings, arguments)
    problems = settings.problems()
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        problems.append(f'serve needs {", ".join(missing)}, not installed here; run: pip install ".[serve]"')
    if problems:
        raise ConfigError(problems)

    from model.locate import locate

    located = locate(settings.checkpoint)
    path = Path(tokenizer_path(settings.tokenizer, located.tokenizer))

    from model.server.running import bind, listen, run, url

    # Before the weights are read, which may take minutes.
    listener = bind(settings.host, settings.port)
    try:
        service, worker = _load(settings, located.weights, path)
        listen(listener, settings.stall_seconds)

        def announce() -> None:
            card = service.card()
            print(
                f"serving {card['id']} at {url(listener)}\n"
                f"{settings.slots} slots of {card['state_bytes_per_sequence']:,} bytes of state each; "
                f"chat template: {card['chat_template']} ({card['chat_note']})",
                flush=True,
            )

        return run(service, worker, listener, announce)
    finally:
        listener.close()


def _load(settings: ServeSettings, weights: Path, tokenizer: Path) -> tuple[Service, BatchWorker]:
    import torch

    from data_pipeline.tokenizing.tokenizer import Tokenizer
    from model.generation.batch import ContinuousBatch
    from model.loading import load
    from model.server.chat import chat_template
    from model.server.service import ServedModel, Service
    from model.server.worker import BatchWorker

    device = device_named(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype_named(settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    loaded = Tokenizer.load(tokenizer)
    chat = chat_template(loaded, tokenizer)
    model = load(weights, device=device, dtype=dtype)
    vocab_size = min(loaded.vocab_size, model.config.vocab_size)
    batch = ContinuousBatch(
        model,
        settings.slots,
        prefill_tokens=settings.prefill_tokens,
        prefix_cache_bytes=settings.prefix_cache_mib * 2**20,
        vocab_size=vocab_size,
    )
    served = ServedModel(
        name=settings.name or Path(settings.checkpoint).absolute().name,
        created=int(time.time()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=vocab_size,
    )
    worker = BatchWorker(batch)
    return Service(served, loaded, chat, worker, settings.limits), worker
