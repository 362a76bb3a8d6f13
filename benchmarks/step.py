"""How long do a forward and a backward pass of whole models take? Ours as written and compiled, beside its peers.

    python -m benchmarks.step --sizes 1b4,400m,7b --contenders written,compiled,llama,official --output NAME.md

Weights and gradients are bfloat16, there is no optimizer. Tokens are random; ours get a document start about every
1,000 tokens, as a corpus has them, which the peers do not know. `llama` is transformers' Llama of as many blocks and as
wide, each block compiled, with PyTorch's fused attention; `official` the package xlstm with its fastest kernels. Every
contender has a process of its own, since a peer may end it; all run on one machine, one after another.
"""

from __future__ import annotations

import argparse
import gc
import json
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

from benchmarks.timing import ceilings, environment  # noqa: E402
from model.accounting import six_n_flops_per_token, training_flops_per_token  # noqa: E402
from model.compilation import CAPTURED, COMPILED, WRITTEN  # noqa: E402
from model.initialisation import initialise  # noqa: E402
from model.language_model import LanguageModel  # noqa: E402
from model.presets import preset  # noqa: E402

VOCABULARY = 50304
DOCUMENT_TOKENS = 1000
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Size:
    """A model of ours, a Llama of like size, and a batch."""

    preset: str
    llama: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SIZES = {
    "7b": Size("xlstm_7b", "llama_7b", 1, 8192),
    "mixed": Size("xlstm_7b_mixed", "llama_7b", 1, 8192),
    "1b4": Size("xlstm_1b4", "llama_1b4", 4, 4096),
    "400m": Size("xlstm_400m", "llama_400m", 8, 2048),
    "neurips": Size("neurips_1b3_7_1", "llama_1b4", 4, 2048),
}


def ours(size: Size, name: str, execution: str) -> Step:
    """Our model `name`."""
    with torch.device("cuda"):
        model = LanguageModel(preset(name, vocab_size=VOCABULARY))
    initialise(model, seed=0)
    model.to(torch.bfloat16)
    model.execution = execution
    tokens = _tokens(size)
    starts = torch.rand(tokens.shape, device="cuda") < 1 / DOCUMENT_TOKENS
    starts[:, 0] = True

    def step() -> Tensor:
        output = model(tokens, targets=tokens, document_start=starts, loss_reduction="sum")
        assert output.loss_sum is not None
        return _backward(model, output.loss_sum / tokens.numel())

    return step


def llama(size: Size) -> Step:
    """transformers' Llama of the sizes of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    like = preset(size.llama, vocab_size=VOCABULARY)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=like.d_model,
        intermediate_size=like.ffn_dim,
        num_hidden_layers=like.n_blocks,
        num_attention_heads=like.attention.n_heads,
        num_key_value_heads=like.attention.n_kv_heads,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False)
    return _of_logits(model, lambda tokens: model(tokens, use_cache=False).logits, size)


def official(size: Size) -> Step:
    """The package xlstm, with chunks of 128 tokens."""
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    like = preset(size.preset, vocab_size=VOCABULARY)
    config = xLSTMLargeConfig(
        embedding_dim=like.d_model,
        num_heads=like.mlstm.n_heads,
        num_blocks=like.n_blocks,
        vocab_size=VOCABULARY,
        return_last_states=False,
        mode="train",
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
        chunk_size=128,
        autocast_kernel_dtype="bfloat16",
    )
    with torch.device("cuda"):
        model = xLSTMLarge(config).to(torch.bfloat16)
    return _of_logits(model, lambda tokens: _first(model(tokens)), size)


def _first(result: Any) -> Tensor:
    logits: Tensor = result[0] if isinstance(result, tuple) else result
    return logits


def _of_logits(model: torch.nn.Module, forward: Callable[[Tensor], Tensor], size: Size) -> Step:
    tokens = _tokens(size)

    @torch.compile
    def loss_of(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return lambda: _backward(model, loss_of(forward(tokens)))


def _tokens(size: Size) -> Tensor:
    return torch.randint(0, VOCABULARY, (size.batch, size.length), device="cuda")


def _backward(model: torch.nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach()


CONTENDERS: dict[str, Callable[[Size], Step]] = {
    WRITTEN: lambda size: ours(size, size.preset, WRITTEN),
    COMPILED: lambda size: ours(size, size.preset, COMPILED),
    CAPTURED: lambda size: ours(size, size.preset, CAPTURED),
    "our llama": lambda size: ours(size, size.llama, COMPILED),
    "llama": llama,
    "official": official,
}


def measure(step: Step, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step (median of rounds of so many), GiB at most, and seconds to the end of the first step."""
    began = time.perf_counter()
    first = float(step())
    to_first = time.perf_counter() - began
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began) / steps)
    gib = torch.cuda.max_memory_allocated() / 2**30
    return {"milliseconds": statistics.median(times), "gib": gib, "to_first": to_first, "first_loss": first}


def run_contender(options: argparse.Namespace) -> None:
    """Measure one contender in this process; a line of JSON for each size."""
    for name in options.sizes.split(","):
        try:
            figures: dict[str, Any] = measure(CONTENDERS[options.only](SIZES[name]), options.steps, options.rounds)
        except Exception as error:
            figures = {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps({"size": name, "contender": options.only, **figures}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def report(rows: list[dict[str, Any]], around: dict[str, str], ceiling: dict[str, float]) -> str:
    """The result file."""
    lines = ["# A forward and a backward pass of whole models", ""]
    lines += [f"- {key}: {value}" for key, value in around.items()]
    lines += [
        f"- ceilings: bf16 products {ceiling['flops_per_second'] / 1e12:.0f} TFLOP/s, "
        f"copy {ceiling['bytes_per_second'] / 1e12:.2f} TB/s",
        "",
        "| size | batch | contender | ms | tokens/s | 6N share | exact share | GiB | first step | `compiled` takes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    best = {row["size"]: row["milliseconds"] for row in rows if row["contender"] == COMPILED and "problem" not in row}
    for row in rows:
        size = SIZES[row["size"]]
        head = f"| {row['size']} | {size.batch} x {size.length} | {row['contender']} |"
        if "problem" in row:
            lines.append(f"{head} {row['problem']} | | | | | | |")
            continue
        config = preset(size.llama if "llama" in row["contender"] else size.preset, vocab_size=VOCABULARY)
        rate = size.tokens / (1e-3 * row["milliseconds"])
        shares = [
            rate * flops / ceiling["flops_per_second"]
            for flops in (six_n_flops_per_token(config), training_flops_per_token(config, size.length))
        ]
        ratio = best[row["size"]] / row["milliseconds"] if row["size"] in best else float("nan")
        lines.append(
            f"{head} {row['milliseconds']:.1f} | {rate:,.0f} | {shares[0]:.1%} | {shares[1]:.1%} | {row['gib']:.1f} | "
            f"{row['to_first']:.1f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1b4,400m", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--contenders", default="written,compiled", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run_contender(options)
        return
    rows = []
    for contender in options.contenders.split(","):
        command = [sys.executable, "-m", "benchmarks.step", "--only", contender, "--sizes", options.sizes]
        command += ["--steps", str(options.steps), "--rounds", str(options.rounds)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            missing = set(options.sizes.split(",")) - {row["size"] for row in rows if row["contender"] == contender}
            rows += [{"size": n, "contender": contender, "problem": f"exit {done.returncode}"} for n in sorted(missing)]
        print(*rows[-len(options.sizes.split(",")) :], sep="\n", flush=True)
    device = torch.device("cuda")
    rows.sort(key=lambda row: options.sizes.split(",").index(row["size"]))
    text = report(rows, environment(device, options.commit), ceilings(device))
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
