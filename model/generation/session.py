"""Generation of text: prompts through the model once, then one token at a time on the recurrent state.

With recurrent blocks alone memory does not grow with the length of the prompt or of what is generated; attention blocks
keep their cache. Axes: B batch, P prompt length, N generated length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.language_model import LanguageModel, ModelOutput
from model.state import ModelState

# Prompt tokens that go through the model at a time: bounds the logits in memory, of which only the last are used.
PREFILL_TOKENS = 512


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_tokens: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
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
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens; None: from all.
        top_p: draw from the most likely tokens that together have at least this probability (arXiv 1904.09751).
        seed: the same seed, prompts and settings give the same tokens on the same device.
        stop_token: ends a sequence; it is the last of its tokens, and fills its row from there on.
        vocab_size: draw only ids below this, where the model has more rows than its tokenizer ids.
        on_token: called after each step with the new tokens [B] int64 and active [B] bool, False for the sequences that
            had ended before; both on the CPU.

    Returns:
        [B, N] int64 on the CPU, without the prompts; shorter than max_new_tokens when every sequence has ended.

    Raises:
        ValueError: a setting or a prompt that makes no sense.
    """
    prompts = [torch.as_tensor(prompt, dtype=torch.int64).cpu() for prompt in prompt_tokens]
    allowed = vocab_size or model.config.vocab_size
    _check(prompts, model.config.vocab_size, max_new_tokens, temperature, top_k, top_p, stop_token)
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(len(prompts))]
    logits, state = _prefill(model, prompts, device)
    state = state.for_decoding()
    active = torch.ones(len(prompts), dtype=torch.bool)
    generated: list[Tensor] = []
    while True:
        draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        tokens = _choose(logits[:, :allowed], draws.to(device), temperature, top_k, top_p)
        here = tokens.cpu()
        if stop_token is not None:
            here = torch.where(active, here, stop_token)
        generated.append(here)
        if on_token is not None:
            on_token(here, active)
        if stop_token is not None:
            active = active & (here != stop_token)
        if len(generated) == max_new_tokens or not active.any():
            return torch.stack(generated, dim=1)
        output = model(here.to(device)[:, None], state=state, return_state=True)
        logits, state = output.logits[:, -1], output.state


def _prefill(model: LanguageModel, prompts: list[Tensor], device: torch.device) -> tuple[Tensor, ModelState]:
    """Logits [B, V] behind the last token of every prompt, and the state there."""
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    document_start = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        document_start[row, length - len(prompt)] = True
    output: ModelOutput | None = None
    for start in range(0, length, PREFILL_TOKENS):
        part = slice(start, start + PREFILL_TOKENS)
        output = model(
            tokens[:, part].to(device),
            document_start=document_start[:, part].to(device),
            state=None if output is None else output.state,
            return_state=True,
        )
    assert output is not None and output.logits is not None and output.state is not None
    return output.logits[:, -1], output.state


def _choose(logits: Tensor, draws: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One token [B] from logits [B, V], where draws [B] in [0, 1) picks among the candidates by their probability."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores, ids = scores[:, :top_k], ids[:, :top_k]
    probabilities = torch.softmax(scores / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token is a candidate when those before it do not have top_p yet; the first always is.
    candidate = cumulative - probabilities < top_p
    candidate[:, 0] = True
    total = (probabilities * candidate).sum(dim=-1, keepdim=True)
    chosen = (cumulative < draws[:, None] * total).sum(dim=-1, keepdim=True)
    chosen = torch.minimum(chosen, candidate.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, chosen).squeeze(1)


def sampling_problems(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> list[str]:
    """What is wrong with settings of `generate`, one line each, whatever the model and its prompts are."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature must be 0 (most likely token) or positive, not {temperature}")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k must be at least 1 or null, not {top_k}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1, not {top_p}")
    return problems


def _check(
    prompts: list[Tensor],
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    stop_token: int | None,
) -> None:
    if not prompts:
        raise ValueError("prompt_tokens holds no prompt")
    for row, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise ValueError(
                f"prompt {row} is empty; give it at least one token (the end-of-document token starts a text)"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"prompt {row} holds ids {prompt.min()} to {prompt.max()}, the model has 0 to {vocab_size - 1}: it was "
                "encoded with another tokenizer"
            )
    if problems := sampling_problems(max_new_tokens, temperature, top_k, top_p):
        raise ValueError("; ".join(problems))
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ValueError(f"stop_token {stop_token} is not among the model's ids 0 to {vocab_size - 1}")
