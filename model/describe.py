"""What `python -m model describe` shows: a model's parameters, FLOPs and memory, from its configuration alone."""

from __future__ import annotations

from typing import Any

from model.accounting import (
    count_parameters,
    decoding_bytes_per_step,
    decoding_flops_per_token,
    forward_flops,
    six_n_flops_per_token,
    training_flops_per_token,
)
from model.config import ModelConfig
from model.hardware import CPU, Hardware
from model.memory import activation_bytes, state_bytes, training_state_bytes
from model.recomputation import ACTIVATION_CHECKPOINTING


def describe(
    config: ModelConfig, sequence_length: int, micro_batch_size: int, ranks: int, device_name: str = CPU
) -> dict[str, Any]:
    """Everything that the table shows, as JSON values. Memory assumes bf16 compute and fp32 optimizer states.

    `device_name`: the GPU whose kernels count, as torch.cuda.get_device_name says it; "CPU": the references.
    """
    hardware = Hardware(device_name)
    counted = count_parameters(config)
    kinds = config.block_kinds()
    zero = {}
    for stage in range(4):
        memory = training_state_bytes(config, stage, ranks)
        zero[str(stage)] = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "total": memory.total,
        }
    return {
        "model": {
            "family": config.family,
            "d_model": config.d_model,
            "vocab_size": config.vocab_size,
            "blocks": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        },
        "parameters": {"total": counted.total, "tensors": counted.tensors, "groups": counted.groups},
        "training_flops": {
            "sequence_length": sequence_length,
            "forward_per_sequence": forward_flops(config, sequence_length, hardware),
            "per_token_exact": training_flops_per_token(config, sequence_length, hardware),
            "per_token_6n": six_n_flops_per_token(config),
        },
        "decoding": {
            "context": sequence_length,
            "flops_per_token": decoding_flops_per_token(config, sequence_length),
            "bytes_per_step": decoding_bytes_per_step(config, context=sequence_length),
            "state_bytes_per_sequence": state_bytes(config, sequence_length),
        },
        "training_memory": {
            "ranks": ranks,
            "zero_stage": zero,
            "micro_batch_size": micro_batch_size,
            "device": device_name,
            "activations": {
                mode: activation_bytes(config, micro_batch_size, sequence_length, mode, hardware)
                for mode in ACTIVATION_CHECKPOINTING
            },
        },
    }


def as_table(description: dict[str, Any]) -> str:
    """The description as lines of text."""
    model, parameters = description["model"], description["parameters"]
    flops, decoding, memory = description["training_flops"], description["decoding"], description["training_memory"]
    blocks = ", ".join(f"{count} {kind}" for kind, count in model["blocks"].items())
    total, forward = parameters["total"], sum(flops["forward_per_sequence"].values())
    lines = [
        f"{total:,} parameters in {parameters['tensors']} tensors",
        f"family {model['family']}, blocks: {blocks}, d_model {model['d_model']}, vocabulary {model['vocab_size']}",
        "",
        "Parameters",
        *(_row(name, f"{count:,}", count / total) for name, count in parameters["groups"].items()),
        "",
        f"FLOPs of the forward pass over {flops['sequence_length']} tokens (backward: twice that)",
        *(_row(name, f"{count:.4g}", count / forward) for name, count in flops["forward_per_sequence"].items()),
        _row("all", f"{forward:.4g}", 1.0),
        "",
        "Training FLOPs per token",
        _row("exact", f"{flops['per_token_exact']:.4g}"),
        _row("6N", f"{flops['per_token_6n']:.4g}"),
        "",
        f"Decoding one token of one sequence after {decoding['context']} (bf16 weights, fp32 state)",
        _row("FLOPs", f"{decoding['flops_per_token']:.4g}"),
        _row("bytes moved", f"{decoding['bytes_per_step'] / 1e9:.2f} GB"),
        _row("state of a sequence", f"{decoding['state_bytes_per_sequence'] / 1e6:.2f} MB"),
        "",
        f"Training memory per rank: weights + gradients + optimizer on {memory['ranks']} ranks, by ZeRO stage",
    ]
    for stage, sizes in memory["zero_stage"].items():
        parts = " + ".join(_gib(sizes[part]) for part in ("weights", "gradients", "optimizer"))
        lines.append(_row(f"stage {stage}", f"{_gib(sizes['total'])} GiB") + f"   = {parts}")
    tokens = f"{memory['micro_batch_size']} x {flops['sequence_length']}"
    backend = "mLSTM reference backend" if memory["device"] == CPU else f"kernels of {memory['device']}"
    lines += ["", f"Activations of a micro-batch of {tokens} tokens ({backend}), by what is recomputed"]
    lines += [_row(mode, f"{_gib(size)} GiB") for mode, size in memory["activations"].items()]
    return "\n".join(lines)


def _row(name: str, value: str, share: float | None = None) -> str:
    row = f"  {name:<28}{value:>18}"
    return row if share is None else f"{row}{share:>8.1%}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
