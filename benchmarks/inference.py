"""How fast is text generated? Time to the first token, time of each further one and memory, ours beside its peers.

    python -m benchmarks.inference --size 7b --prompts 512,8192,131072 --batches 1,8,64 --output NAME.md
    python -m benchmarks.inference --size tiny --device cpu --prompts 16 --batches 1,2 --new-tokens 4

Weights are random, bfloat16 on a GPU and float32 on a CPU; every contender decodes greedily from random prompts, all
rows of a batch equally long, and no token ends a sequence. `ours` is model.generation.generate; `ours_unplayed` the
same without CUDA graphs; `ours_served` our server, asked by a client a row, whose memory is not measured;
`transformers_xlstm` the xLSTM of transformers with its own native kernels; `transformers_llama` its Llama of as many
blocks and as wide, with a static cache, compiled where there is a GPU;
`transformers_mamba2` its Mamba-2, as wide and with twice as many blocks, by the package mamba_ssm where that is there.
A peer that is not installed, or cannot run this, has its reason in the table. Every contender has a process of its own.

Time to the first token includes reading the prompt. Memory is the most that was allocated, weights included; on a CPU
the growth of the process's peak. A time of a CPU tells nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.inference_figure import draw  # noqa: E402
from benchmarks.timing import environment  # noqa: E402
from model.generation import generate  # noqa: E402
from model.generation import session as session_module  # noqa: E402
from model.language_model import LanguageModel  # noqa: E402
from model.presets import preset  # noqa: E402

# Continues prompts [B, P] by so many tokens, [B, N].
Continue = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Size:
    """A model of ours and a Llama of like size."""

    preset: str
    llama: str


SIZES = {
    "7b": Size("xlstm_7b", "llama_7b"),
    "1b4": Size("xlstm_1b4", "llama_1b4"),
    "400m": Size("xlstm_400m", "llama_400m"),
    "tiny": Size("tiny_mlstm", "tiny_llama"),
}


def ours(size: Size, device: torch.device) -> Continue:
    """model.generation.generate."""
    model = _ours(size, device)
    return lambda prompts, count: generate(model, prompts, max_new_tokens=count, temperature=0)


def ours_served(size: Size, device: torch.device) -> Continue:
    """The same behind `python -m model serve`, asked by a client a row."""
    from benchmarks.served import Served

    served = Served(_ours(size, device))
    if device.type == "cuda":
        # Of a GPU's memory nothing is kept from the server.
        torch.cuda.empty_cache()
    return served.continued


def _ours(size: Size, device: torch.device) -> LanguageModel:
    with torch.device(device):
        model = LanguageModel(preset(size.preset)).to(_dtype(device))
    # On the device: a generator of the CPU takes minutes for 7B.
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1.0)
    return model


def ours_unplayed(size: Size, device: torch.device) -> Continue:
    """The same, each kernel launched by the host."""
    session_module.PLAYING_GRAPHS = ()
    return ours(size, device)


def transformers_xlstm(size: Size, device: torch.device) -> Continue:
    """transformers' xLSTM of the same configuration."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    like = preset(size.preset)
    config = xLSTMConfig(
        vocab_size=like.vocab_size,
        hidden_size=like.d_model,
        num_hidden_layers=like.n_blocks,
        num_heads=like.mlstm.n_heads,
        qk_dim_factor=like.mlstm.qk_dim_factor,
        v_dim_factor=like.mlstm.v_dim_factor,
        ffn_proj_factor=like.ffn_dim / like.d_model,
        ffn_round_up_to_multiple_of=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.device(device):
        model = xLSTMForCausalLM(config).to(_dtype(device)).eval()
    return _of_transformers(model)


def transformers_llama(size: Size, device: torch.device) -> Continue:
    """transformers' Llama of like size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    like = preset(size.llama)
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=like.d_model,
        intermediate_size=like.ffn_dim,
        num_hidden_layers=like.n_blocks,
        num_attention_heads=like.attention.n_heads,
        num_key_value_heads=like.attention.n_kv_heads,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        max_position_embeddings=2**20,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(_dtype(device)).eval()
    # Of a static cache transformers compiles the decoding step by itself where there is a GPU.
    return _of_transformers(model, cache_implementation="static")


def transformers_mamba2(size: Size, device: torch.device) -> Continue:
    """transformers' Mamba-2 of like size: one of its blocks has about half the weights of one of ours."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    like = preset(size.preset)
    head_dim = 64
    config = Mamba2Config(
        vocab_size=like.vocab_size,
        hidden_size=like.d_model,
        num_hidden_layers=2 * like.n_blocks,
        expand=2,
        head_dim=head_dim,
        num_heads=2 * like.d_model // head_dim,
        n_groups=1,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    with torch.device(device):
        model = Mamba2ForCausalLM(config).to(_dtype(device)).eval()
    return _of_transformers(model)


def _of_transformers(model: Any, **arguments: Any) -> Continue:
    def continued(prompts: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            whole: Tensor = model.generate(
                prompts.to(model.device), max_new_tokens=count, min_new_tokens=count, do_sample=False, **arguments
            )
        return whole[:, prompts.shape[1] :].cpu()

    return continued


CONTENDERS: dict[str, Callable[[Size, torch.device], Continue]] = {
    "ours": ours,
    "ours_unplayed": ours_unplayed,
    "ours_served": ours_served,
    "transformers_xlstm": transformers_xlstm,
    "transformers_llama": transformers_llama,
    "transformers_mamba2": transformers_mamba2,
}


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure(continued: Continue, prompts: Tensor, new_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token and for each further one, both medians, and the peak memory in GiB.

    The time of a further token is the difference between a long and a short continuation, by the number of tokens.
    """
    on_gpu = torch.cuda.is_available()
    # What is compiled, tuned or captured at the first call is not of interest.
    continued(prompts, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, rest = [], []
    for _ in range(rounds):
        to_first = _seconds(continued, prompts, 1)
        to_last = _seconds(continued, prompts, new_tokens)
        first.append(1e3 * to_first)
        rest.append(1e3 * (to_last - to_first) / (new_tokens - 1))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    peak = torch.cuda.max_memory_allocated() if on_gpu else grown
    return {"first": statistics.median(first), "further": statistics.median(rest), "gib": peak / 2**30}


def _seconds(continued: Continue, prompts: Tensor, count: int) -> float:
    began = time.perf_counter()
    # The tokens are on the CPU when it returns.
    tokens = continued(prompts, count)
    taken = time.perf_counter() - began
    if tokens.shape != (prompts.shape[0], count):
        raise RuntimeError(f"{tuple(tokens.shape)} tokens came in the place of {(prompts.shape[0], count)}")
    return taken


def run_contender(options: argparse.Namespace) -> None:
    """Measure one contender in this process; a line of JSON for each batch and prompt length."""
    device, size = torch.device(options.device), SIZES[options.size]
    problem, continued = "", None
    try:
        continued = CONTENDERS[options.only](size, device)
    except Exception as error:
        problem = _told(error)
    generator = torch.Generator().manual_seed(0)
    for batch in options.batches:
        for length in options.prompts:
            row: dict[str, Any] = {"contender": options.only, "batch": batch, "prompt": length}
            prompts = torch.randint(preset(size.preset).vocab_size, (batch, length), generator=generator)
            try:
                if continued is None:
                    raise RuntimeError(problem)
                row |= measure(continued, prompts, options.new_tokens, options.rounds)
            except Exception as error:
                row["problem"] = problem or _told(error)
            print(json.dumps(row), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def report(rows: list[dict[str, Any]], around: dict[str, str], size: str, new_tokens: int) -> str:
    """The result file; its last columns are the times divided by those of `ours` for the same batch and prompt."""
    lines = ["# Generating text", ""]
    lines += [f"- {key}: {value}" for key, value in around.items()]
    lines += [
        f"- size: {size} ({SIZES[size].preset}, {SIZES[size].llama}), {new_tokens} new tokens",
        "",
        "| batch | prompt | contender | first token, ms | further, ms | tokens/s | GiB | by ours: first | further |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    our_rows = {(row["batch"], row["prompt"]): row for row in rows if row["contender"] == "ours" and "first" in row}
    for row in rows:
        head = f"| {row['batch']} | {row['prompt']:,} | {row['contender']} |"
        if "problem" in row:
            lines.append(f"{head} {row['problem']} | | | | | |")
            continue
        own = our_rows.get((row["batch"], row["prompt"]))
        ratios = [f"{row[key] / own[key]:.2f}" if own else "" for key in ("first", "further")]
        lines.append(
            f"{head} {row['first']:.1f} | {row['further']:.2f} | {1e3 * row['batch'] / row['further']:,.0f} | "
            f"{row['gib']:.2f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"positive whole numbers with commas between them are wanted, not {text}")
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"unknown contender {unknown[0]!r}; use of {', '.join(CONTENDERS)}")
    return text.split(",")


def main() -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", choices=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--prompts", type=_numbers, default=[512, 8192, 32768], help="tokens of a prompt")
    parser.add_argument("--batches", type=_numbers, default=[1, 8], help="sequences at once")
    parser.add_argument("--contenders", type=_names, default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--new-tokens", type=int, default=128, help="2 at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3600, help="that a contender may take")
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path, help="the table, NAME.md; its figure is NAME.png")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.new_tokens < 2 or options.rounds < 1:
        parser.error(f"--new-tokens must be at least 2 and --rounds 1, not {options.new_tokens} and {options.rounds}")
    if options.only:
        run_contender(options)
        return 0
    rows: list[dict[str, Any]] = []
    for contender in options.contenders:
        rows += _in_a_process_of_its_own(contender, options)
        print(*rows[-len(options.batches) * len(options.prompts) :], sep="\n", flush=True)
    rows.sort(key=lambda row: (row["batch"], row["prompt"]))
    text = report(rows, environment(torch.device(options.device), options.commit), options.size, options.new_tokens)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
        draw(rows, options.size, options.output.with_suffix(".png"))
    return 0 if all("first" in row for row in rows if row["contender"].startswith("ours")) else 1


def _in_a_process_of_its_own(contender: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.inference", "--only", contender, "--size", options.size]
    command += ["--device", options.device, "--new-tokens", str(options.new_tokens), "--rounds", str(options.rounds)]
    for name in ("prompts", "batches"):
        command += [f"--{name}", ",".join(map(str, getattr(options, name)))]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=options.seconds)
        printed, end = done.stdout, f"exit {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed, end = (error.stdout or b"").decode(), f"more than {options.seconds} s"
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    there = {(row["batch"], row["prompt"]) for row in rows}
    wanted = [(batch, length) for batch in options.batches for length in options.prompts]
    missing = [pair for pair in wanted if pair not in there]
    return rows + [{"contender": contender, "batch": b, "prompt": p, "problem": end} for b, p in missing]


if __name__ == "__main__":
    sys.exit(main())
