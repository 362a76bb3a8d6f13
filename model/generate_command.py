"""`python -m model generate`: from KEY=VALUE arguments to text on the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf import ConfigError
from conf.problems import local_folder
from model.command_settings import device_named, dtype_named, read_settings, tokenizer_path

# PyTorch takes a while to import: what needs it does so.
if TYPE_CHECKING:
    from data_pipeline.tokenizing.tokenizer import Tokenizer
    from model.generation import ContinuousBatch, SamplingSettings
    from model.generation.text import TextStream

GENERATE_HELP = """\
Continue text with a trained model.

  checkpoint=NAME               a run's directory (its newest complete checkpoint), RUN@STEP, a checkpoint, a weights
                                directory or a Hugging Face directory
  prompt=TEXT                   what to continue; give it several times for a batch; without it a document is begun
  tokenizer=PATH                a tokenizer file or folder; null (default): the run's own
  max_new_tokens=100
  temperature=0.8               0: always the most likely token
  top_k=null                    draw from the k most likely tokens only
  top_p=0.95                    draw from the most likely tokens that together have this probability
  min_p=0                       draw from tokens with at least this share of the most likely one's probability
  repetition_penalty=1          above 1: tokens that the text holds become less likely
  stop=TEXT                     end before this text; give it several times for several
  seed=0
  save_state=FILE               write what the model has read, the prompt, to a new file
  state=FILE                    continue behind what the model had read then; prompt is what comes next
  device=null                   null (default): the GPU where there is one
  dtype=null                    bfloat16 | float32; null (default): bfloat16 on a GPU, else float32

examples:
  python -m model generate checkpoint=runs/first prompt="The order" max_new_tokens=20
  python -m model generate checkpoint=runs/first@1000 prompt="def f(" temperature=0 stop="return"
  python -m model generate checkpoint=runs/first prompt="A long text." save_state=read.safetensors
  python -m model generate checkpoint=runs/first state=read.safetensors prompt=" In short:"
"""
# Keys that may be given several times. Their values are taken as they are, without a grammar of values.
_TEXTS = ("prompt", "stop")
# Sequences that are continued at once.
_MOST_SLOTS = 64


@dataclass(frozen=True)
class GenerateSettings:
    checkpoint: str = "???"
    tokenizer: str | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    save_state: str | None = None
    state: str | None = None
    device: str | None = None
    dtype: str | None = None


def run(arguments: list[str]) -> int:
    """Continue the prompts of `arguments`; returns the exit code. Raises ConfigError and other ValueErrors."""
    texts = {key: [a.removeprefix(f"{key}=") for a in arguments if a.startswith(f"{key}=")] for key in _TEXTS}
    others = [argument for argument in arguments if not argument.startswith(tuple(f"{key}=" for key in _TEXTS))]
    settings = read_settings(GenerateSettings, others, also=_TEXTS)

    import torch

    from model.generation import ContinuousBatch, read
    from model.generation.prefill import tokens_at_once
    from model.generation.state_files import load_prefix, save_prefix

    if problems := _problems(settings, texts):
        raise ConfigError(problems)

    from data_pipeline.tokenizing.tokenizer import Tokenizer
    from model.loading import load
    from model.locate import locate

    device = device_named(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype_named(settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    located = locate(settings.checkpoint)
    tokenizer = Tokenizer.load(tokenizer_path(settings.tokenizer, located.tokenizer))
    model = load(located.weights, device=device, dtype=dtype)
    behind = None if settings.state is None else load_prefix(settings.state, model)
    # A text starts behind the end of another, as in training.
    begun = [tokenizer.eod_id] if behind is None else []
    prompts = [[*begun, *tokenizer.encode(text)] for text in texts["prompt"] or [""]]
    held = () if behind is None else behind.tokens
    piece = tokens_at_once(model, len(held) + max(map(len, prompts)))
    shown = _Texts(tokenizer, held, prompts, texts["stop"])
    if settings.save_state is not None:
        [prompt] = prompts
        if prompt or behind is None:
            behind = read(model, prompt, behind=behind, piece=piece)
        save_prefix(settings.save_state, behind, model)
        prompts = [[]]
    slots = min(len(prompts), _MOST_SLOTS)
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    batch = ContinuousBatch(model, slots, prefill_tokens=piece, vocab_size=n_ids)
    for row, prompt in enumerate(prompts):
        batch.add(prompt, _sampling(settings, row, tokenizer.eod_id), behind=behind)
    shown.follow(batch)
    return 0


def _problems(settings: GenerateSettings, texts: dict[str, list[str]]) -> list[str]:
    """What can be said before a model is loaded."""
    from model.generation.text import stop_problems

    problems = [*_sampling(settings, 0).problems(), *stop_problems(texts["stop"])]
    if settings.save_state is not None:
        problems += local_folder("save_state", settings.save_state)
        if Path(settings.save_state).exists():
            problems.append(f"save_state: {settings.save_state} exists; name a new file")
        elif not Path(settings.save_state).absolute().parent.is_dir():
            problems.append(f"save_state: the folder of {settings.save_state} does not exist; make it first")
        if len(texts["prompt"]) > 1:
            problems.append(f"save_state: takes what one prompt leaves, not {len(texts['prompt'])}; give one")
    if settings.state is not None and not Path(settings.state).exists():
        problems.append(f"state: {settings.state} does not exist; name a file that save_state wrote")
    return problems


def _sampling(settings: GenerateSettings, row: int, stop_token: int | None = None) -> SamplingSettings:
    from model.generation import SamplingSettings

    return SamplingSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        # As model.generation.generate has it.
        seed=settings.seed * 1_000_003 + row,
        stop_tokens=() if stop_token is None else (stop_token,),
    )


@dataclass
class _Text:
    stream: TextStream
    # What is to be printed still.
    text: str


class _Texts:
    """Prints one text as it grows; several each as a whole at the end. Nothing before the first new token: until then
    an error may come."""

    def __init__(
        self, tokenizer: Tokenizer, held: Sequence[int], prompts: Sequence[Sequence[int]], stop: Sequence[str]
    ):
        """`held`: ids before the prompts, whose text is not shown."""
        from model.generation.text import TextStream

        self._texts = []
        before = tokenizer.decode(held)
        for prompt in prompts:
            ids = [*held, *prompt]
            shown = tokenizer.decode(ids)[len(before) :]
            self._texts.append(_Text(TextStream(tokenizer.decode, ids, stop), shown))
        self._streams = len(prompts) == 1
        # A terminal or file in another encoding gets "?" for what it cannot say.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def follow(self, batch: ContinuousBatch) -> None:
        """Print what the requests of `batch`, as many as there are texts and in their order, are continued with."""
        while batch.waiting or batch.running:
            for token in batch.step():
                text = self._texts[token.request]
                self._show(text, text.stream.add(token.token))
                if text.stream.stopped:
                    batch.cancel(token.request)
                elif token.finish_reason is not None:
                    self._show(text, text.stream.finish())
        if self._streams:
            print()
            return
        for number, text in enumerate(self._texts, 1):
            print(f"--- {number}\n{text.text}")

    def _show(self, text: _Text, new: str) -> None:
        if not self._streams:
            text.text += new
            return
        print(text.text + new, end="", flush=True)
        text.text = ""
