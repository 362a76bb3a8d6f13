"""Writes a model as a directory that transformers.AutoModelForCausalLM loads, and proves it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.huggingface.base import CONFIG, HEAD, Format, HuggingFaceError, OtherLogitsError
from model.huggingface.formats import format_for, format_named
from model.huggingface.plugin_format import PLUGIN
from model.huggingface.tokenizer import ExportedTokenizer, export_tokenizer
from model.language_model import LanguageModel
from model.parameters import parameter_shapes
from model.weights import WeightsReader, read_model_json
from model.whole_tensors import SHARD_BYTES, new_directory, write_whole_tensors

TOLERANCE = 1e-4
# Of a comparison, where no chunk of the mLSTM says how many tokens are enough.
_FEW_TOKENS = 64


def export_huggingface(
    source: LanguageModel | str | Path,
    output_directory: str | Path,
    tokenizer: ExportedTokenizer | None = None,
    *,
    format: str = "transformers",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
    sequence_length: int | None = None,
) -> list[str]:
    """Write `source` as a directory that transformers.AutoModelForCausalLM and AutoTokenizer load.

    In the format "transformers" models of attention blocks alone become a Llama, all others an xLSTM. A tied head of an
    xLSTM is written as a second copy of the embedding, since that format unties them. The format "plugin" holds every
    model; transformers loads it where this package is installed.

    Args:
        source: a model, or a directory in the format of model/weights.py.
        output_directory: must not exist yet, or be empty. Nothing is left there when the export is refused.
        tokenizer: gives the files of the tokenizer and the ids of its end-of-document token, which is both what a
            document ends with (eos) and what it starts after (bos).
        format: "transformers" or "plugin".
        dtype: of the written weights, float32 or bfloat16.
        verify: load the directory in transformers and in this package in float32 and compare logits. Takes twice the
            memory of the fp32 weights.
        sequence_length: tokens of a training sample, for the longest text that config.json names, but for an xLSTM.

    Returns:
        Notes for the user: what could not be carried over exactly.

    Raises:
        HuggingFaceError: the format cannot express the model; OtherLogitsError: the logits differ by more than 1e-4.
        ValueError: the directory is taken, the format is unknown, or `transformers` is missing.
        WeightsError: `source` is no whole weights directory.
    """
    config, shapes, read = _open_source(source)
    target = format_named(format, config)
    reasons = target.inexpressible(config)
    way = "; format=plugin can" if reasons else ""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        reasons.append(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is {config.vocab_size}: it is not the "
            "tokenizer of this model"
        )
    if reasons:
        raise HuggingFaceError(f"the Hugging Face {target.name} format cannot express this model{way}", reasons)
    if config.tie_embeddings and not target.ties_head:
        shapes, read = _untied(shapes, read)
    transformers = _import_transformers() if verify else None
    with new_directory(Path(output_directory)) as partial:
        _write_weights(partial, target, shapes, read, dtype)
        _write_json(partial / CONFIG, huggingface_config(config, dtype, tokenizer, sequence_length, target))
        for name, text in target.files.items():
            (partial / name).write_text(text, encoding="utf-8")
        ids = _special_ids(tokenizer)
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
        notes = export_tokenizer(tokenizer, partial) if tokenizer is not None else []
        if verify:
            if target is PLUGIN:
                _register_plugin()
            _verify(transformers, partial, config, read, dtype)
    if config.tie_embeddings and not target.ties_head:
        notes.append("the head is tied to the embedding; the directory holds two copies, which are no longer tied")
    if target is PLUGIN:
        notes.append(
            "transformers loads it where xlstm-pretrain is installed: call model.huggingface.plugin.register() first, "
            "or give trust_remote_code=True"
        )
    return notes


def huggingface_config(
    config: ModelConfig,
    dtype: torch.dtype,
    tokenizer: ExportedTokenizer | None,
    sequence_length: int | None = None,
    target: Format | None = None,
) -> dict[str, Any]:
    """config.json of a model for which `inexpressible` found no reason; without a target in its `format_for`."""
    return {**(target or format_for(config)).config_json(config, dtype, sequence_length), **_special_ids(tokenizer)}


def _special_ids(tokenizer: ExportedTokenizer | None) -> dict[str, int | None]:
    eod = None if tokenizer is None else tokenizer.eod_id
    return {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}


def _open_source(
    source: LanguageModel | str | Path,
) -> tuple[ModelConfig, dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """(configuration, shape of every parameter, name -> whole tensor)."""
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

    return config, parameter_shapes(config), read


def _untied(
    shapes: dict[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """The shapes and the reader of a model whose head is a copy of its embedding."""
    embedding = "embedding.weight"
    return {**shapes, HEAD: shapes[embedding]}, lambda name: read(embedding if name == HEAD else name)


def _write_weights(
    directory: Path,
    target: Format,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    ours = {theirs: name for theirs, [name] in target.tensor_layout(shapes, {}).items()}
    theirs = {name: shapes[ours[name]] for name in ours}
    write_whole_tensors(directory, theirs, lambda name: read(ours[name]), dtype, {"format": "pt"}, SHARD_BYTES)


def _verify(
    transformers: Any, directory: Path, config: ModelConfig, read: Callable[[str], torch.Tensor], dtype: torch.dtype
) -> None:
    ours = LanguageModel(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(read(name).to(dtype))
    with _without_progress_bar(transformers):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # More than one chunk, and not whole chunks.
    length = 21 + (_FEW_TOKENS if config.mlstm is None else config.mlstm.reference_chunk_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        difference = (ours(tokens).logits - theirs(tokens, use_cache=False).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise OtherLogitsError(
            "the exported model is not the same in transformers",
            [f"logits differ by {difference:.3g}, more than {TOLERANCE}; nothing was written"],
        )


@contextlib.contextmanager
def _without_progress_bar(transformers: Any) -> Iterator[None]:
    """A model that is read to be compared is no news."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the export compares logits with transformers, which cannot be imported ({error}); install it with "
            "pip install 'xlstm-pretrain[huggingface]', or export without the check (verify=false)"
        ) from None
    return transformers


def _register_plugin() -> None:
    # Only what computes in transformers waits for its import.
    from model.huggingface.plugin import register

    register()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
