"""Continuing a batch of prompts together, from their first token to the last.

With recurrent blocks alone memory does not grow with the length of the prompt or of what is generated; attention blocks
keep their cache. Sequences that come and go are in model/generation/batch.py.

Axes: B batch, P prompt length, N generated length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.generation.host_copy import HostCopy
from model.generation.prefill import read_batch, tokens_at_once
from model.generation.sampling import Sampler, SamplingSettings
from model.generation.session import Session
from model.language_model import LanguageModel
from model.state import ModelState


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_tokens: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    on_token: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Continue a batch of prompts.

    Prompts of different lengths are padded on the left, and their first token starts a document: the model begins there
    from an empty state, so that nothing of the padding has any part in what is generated. A sequence draws its own
    random numbers, so it is continued alike (up to rounding) whatever else is in the batch.

    Args:
        model: on any device and in any dtype; the recurrent state is float32 at least.
        prompt_tokens: [B, P] int64, or one sequence of ids for each prompt; no prompt may be empty.
        max_new_tokens: N at most.
        temperature, top_k, top_p, min_p, repetition_penalty: as in SamplingSettings.
        seed: the same seed, prompts and settings give the same tokens on the same device.
        stop_token: ends a sequence; it is the last of its tokens, and fills its row from there on.
        vocab_size: draw only ids below this, where the model has more rows than its tokenizer ids.
        on_token: called after each step with the new tokens [B] int64 and active [B] bool, False for the sequences that
            had ended before; both on the CPU. On a GPU the next step is under way meanwhile.

    Returns:
        [B, N] int64 on the CPU, without the prompts; shorter than max_new_tokens when every sequence has ended.

    Raises:
        ValueError: a setting or a prompt that makes no sense.
    """
    prompts = [torch.as_tensor(prompt, dtype=torch.int64).cpu() for prompt in prompt_tokens]
    settings = [
        SamplingSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed * 1_000_003 + row,
        )
        for row in range(len(prompts))
    ]
    n_ids = model.config.vocab_size
    _check(prompts, n_ids, settings, stop_token)
    rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
    state, logits = _read(model, prompts, longest)
    session = Session(model, rows, batch_sizes=[rows], like=(logits, state), tokens=longest)
    session.put(0, state, logits)
    del state, logits
    sampler = Sampler(rows, min(vocab_size or n_ids, n_ids), session.device)
    for row, prompt in enumerate(prompts):
        sampler.begin(row, settings[row], prompt)
    active = torch.ones(rows, dtype=torch.bool)
    generated: list[Tensor] = []
    while True:
        drawn = sampler.draw(session.logits)
        session.tokens.copy_(drawn.tokens)
        copy = HostCopy(drawn)
        is_last = len(generated) + 1 == max_new_tokens
        if session.runs_ahead and not is_last:
            session.fit(longest + len(generated) + 1)
            session.step(rows)
        tokens = copy.tokens()
        if stop_token is not None:
            tokens = torch.where(active, tokens, stop_token)
        generated.append(tokens)
        if on_token is not None:
            on_token(tokens, active)
        if stop_token is not None:
            active = active & (tokens != stop_token)
        if is_last or not active.any():
            return torch.stack(generated, dim=1)
        if not session.runs_ahead:
            session.fit(longest + len(generated))
            session.step(rows)


def _read(model: LanguageModel, prompts: list[Tensor], longest: int) -> tuple[ModelState, Tensor]:
    """The state behind the last token of every prompt, and the logits [B, V] there."""
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    document_start = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        document_start[row, longest - len(prompt)] = True
    device = next(model.parameters()).device
    starts = None if all(len(prompt) == longest for prompt in prompts) else document_start.to(device)
    piece = max(1, tokens_at_once(model, longest) // len(prompts))
    logits, state = read_batch(model, tokens.to(device), starts, None, piece)
    return state, logits


def _check(prompts: list[Tensor], n_ids: int, settings: list[SamplingSettings], stop_token: int | None) -> None:
    if not prompts:
        raise ValueError("prompt_tokens holds no prompt")
    for row, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise ValueError(
                f"prompt {row} is empty; give it at least one token (the end-of-document token starts a text)"
            )
        if prompt.min() < 0 or prompt.max() >= n_ids:
            raise ValueError(
                f"prompt {row} holds ids {prompt.min()} to {prompt.max()}, the model has 0 to {n_ids - 1}: it was "
                "encoded with another tokenizer"
            )
    if problems := settings[0].problems():
        raise ValueError("; ".join(problems))
    if stop_token is not None and not 0 <= stop_token < n_ids:
        raise ValueError(f"stop_token {stop_token} is not among the model's ids 0 to {n_ids - 1}")
