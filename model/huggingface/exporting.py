"""Writes a model as a directory that transformers.AutoModelForCausalLM loads, and proves it.

The format holds exactly one architecture, the 7B block with exponential gates (transformers, models/xlstm), so
everything else is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.huggingface.names import CONFIG, INDEX, WEIGHTS, HuggingFaceError, tensor_layout
from model.huggingface.tokenizer import ExportedTokenizer, export_tokenizer
from model.language_model import LanguageModel
from model.layers import layer_kinds
from model.parameters import parameter_shapes
from model.weights import WeightsReader, read_model_json, refuse_taken, save_tensors

TOLERANCE = 1e-4
SHARD_BYTES = 4 * 2**30
# The factor of the feed-forward width is given with a multiple that it is rounded up to.
FFN_ALIGNMENT = 64


def inexpressible(config: ModelConfig) -> list[str]:
    """Every reason why `config` has no counterpart in the Hugging Face xLSTM format; empty when it has one."""
    reasons = []
    if config.family != "xlstm_7b":
        reasons.append(f"model.family={config.family}: only the block of the 7B family exists there")
    kinds = layer_kinds(config)
    for kind in dict.fromkeys(kinds):
        positions = [index for index, other in enumerate(kinds) if other is kind]
        reasons += kind.huggingface_reasons(config, positions)
    if config.logit_soft_cap is None:
        reasons.append("model.logit_soft_cap=null: the logits always have a soft cap there")
    return reasons


def export_huggingface(
    source: LanguageModel | str | Path,
    output_directory: str | Path,
    tokenizer: ExportedTokenizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> list[str]:
    """Write `source` as a directory that transformers.AutoModelForCausalLM and AutoTokenizer load.

    A tied head is written as a second copy of the embedding, since the format unties them.

    Args:
        source: a model, or a directory in the format of model/weights.py.
        output_directory: must not exist yet, or be empty. Nothing is left there when the export is refused.
        tokenizer: gives the files of the tokenizer and the ids of its end-of-document token, which is both what a
            document ends with (eos) and what it starts after (bos).
        dtype: of the written weights, float32 or bfloat16.
        verify: load the directory in transformers and in this package in float32 and compare logits. Takes twice the
            memory of the fp32 weights.

    Returns:
        Notes for the user: what could not be carried over exactly.

    Raises:
        HuggingFaceError: the format cannot express the model, or the logits differ by more than 1e-4.
        ValueError: the directory is taken, or `transformers` is missing.
        WeightsError: `source` is no whole weights directory.
    """
    config, shapes, read = _open_source(source)
    reasons = inexpressible(config)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        reasons.append(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is {config.vocab_size}: it is not the "
            "tokenizer of this model"
        )
    if reasons:
        raise HuggingFaceError("the Hugging Face xLSTM format cannot express this model", reasons)
    transformers = _import_transformers() if verify else None
    output = Path(output_directory)
    refuse_taken(output)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, shapes, read, dtype)
        _write_json(partial / CONFIG, huggingface_config(config, dtype, tokenizer))
        ids = _special_ids(tokenizer)
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
        notes = export_tokenizer(tokenizer, partial) if tokenizer is not None else []
        if verify:
            _verify(transformers, partial, config, read, dtype)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if config.tie_embeddings:
        notes.append("the head is tied to the embedding; the directory holds two copies, which are no longer tied")
    return notes


def huggingface_config(config: ModelConfig, dtype: torch.dtype, tokenizer: ExportedTokenizer | None) -> dict[str, Any]:
    """config.json of a model for which `inexpressible` found no reason."""
    mlstm, ffn_dim = config.mlstm, config.ffn_dim
    assert mlstm is not None and ffn_dim is not None and mlstm.gate_soft_cap is not None
    assert config.logit_soft_cap is not None
    multiple = math.gcd(ffn_dim, FFN_ALIGNMENT)

    def rounded_up(width: float) -> int:
        return int((width + multiple - 1) // multiple * multiple)

    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "embedding_dim": config.d_model,
        "num_hidden_layers": config.n_blocks,
        "num_blocks": config.n_blocks,
        "num_heads": mlstm.n_heads,
        "qk_dim_factor": _factor(mlstm.qk_width(config.d_model), config.d_model, int),
        "v_dim_factor": _factor(mlstm.v_width(config.d_model), config.d_model, int),
        "ffn_proj_factor": _factor(ffn_dim, config.d_model, rounded_up),
        "ffn_round_up_to_multiple_of": multiple,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": False,
        "norm_eps": config.norm_eps,
        "norm_reduction_force_float32": True,
        "eps": mlstm.cell_eps,
        "gate_soft_cap": float(mlstm.gate_soft_cap),
        "output_logit_soft_cap": float(config.logit_soft_cap),
        "weight_mode": "single",
        "mode": "inference",
        "chunk_size": mlstm.reference_chunk_size,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "autocast_kernel_dtype": str(dtype).removeprefix("torch."),
        "inference_state_dtype": "float32",
        "return_last_states": True,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: ExportedTokenizer | None) -> dict[str, int | None]:
    eod = None if tokenizer is None else tokenizer.eod_id
    return {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}


def _factor(width: int, d_model: int, rounded: Callable[[float], int]) -> float:
    """A factor from which transformers computes `width`: the quotient may fall short of it by one rounding."""
    factor = width / d_model
    if rounded(d_model * factor) != width:
        factor = math.nextafter(factor, math.inf)
    assert rounded(d_model * factor) == width, f"no factor of {d_model} gives {width}"
    return factor


def _open_source(
    source: LanguageModel | str | Path,
) -> tuple[ModelConfig, dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """(configuration, shape of every parameter with the head untied, name -> whole tensor)."""
    if isinstance(source, LanguageModel):
        config, parameters = source.config, dict(source.named_parameters())

        def read(name: str) -> torch.Tensor:
            return parameters[name].detach().cpu()
    else:
        config, reader = read_model_json(source), WeightsReader(Path(source))
        reader.check_coverage()

        def read(name: str) -> torch.Tensor:
            shape = reader.shapes[name]
            return reader.read_range(name, 0, math.prod(shape)).view(shape)

    shapes = parameter_shapes(config)
    if not config.tie_embeddings:
        return config, shapes, read
    shapes["lm_head.weight"] = shapes["embedding.weight"]
    return config, shapes, lambda name: read("embedding.weight" if name == "lm_head.weight" else name)


def _write_weights(
    directory: Path, shapes: dict[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS
        layout = tensor_layout(names, fused=False)
        # Copies, since a file must not hold one storage twice (the head may be tied to the embedding).
        tensors = {theirs: read(name).to(dtype, copy=True).contiguous() for theirs, [name] in layout.items()}
        save_tensors(directory / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _verify(
    transformers: Any, directory: Path, config: ModelConfig, read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    ours = LanguageModel(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(read(name).to(dtype))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # More than one chunk, and not whole chunks.
    assert config.mlstm is not None
    length = config.mlstm.reference_chunk_size + 21
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        difference = (ours(tokens).logits - theirs(tokens, use_cache=False).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise HuggingFaceError(
            "the exported model is not the same in transformers",
            [f"logits differ by {difference:.3g}, more than {TOLERANCE}; nothing was written"],
        )


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the export compares logits with transformers, which cannot be imported ({error}); install it with "
            "pip install 'xlstm-pretrain[huggingface]', or export without the check (verify=false)"
        ) from None
    return transformers


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
