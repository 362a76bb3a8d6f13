"""Our models as classes of transformers: `register()`, then AutoModelForCausalLM loads a folder of `format=plugin`.

The only file that cannot be imported without transformers.

Axes: B batch, S tokens of this call, T tokens of all calls, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kernels.cross_entropy import MASKED
from model.config import ModelConfig
from model.huggingface.plugin_format import FORMAT_VERSION, MODEL_TYPE, PLUGIN, auto_map, model_of, usual_values
from model.initialisation import initialise_parameter
from model.language_model import LanguageModel
from model.state import ModelState

# Earlier releases of transformers give it to every model in `generate`; the StateCache knows it too.
_KNOWN_ALREADY = "cache_position"


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM load models of this format; may be called again."""
    AutoConfig.register(MODEL_TYPE, XLSTMPretrainConfig, exist_ok=True)
    AutoModelForCausalLM.register(XLSTMPretrainConfig, XLSTMPretrainForCausalLM, exist_ok=True)


class XLSTMPretrainConfig(PreTrainedConfig):
    """What config.json says. `model`: the values of our ModelConfig, with its sections as dictionaries."""

    model_type = MODEL_TYPE

    def __init__(self, model: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **values: Any):
        # transformers also makes one without values, to see what the defaults are.
        config = ModelConfig()
        if model is not None or values:
            directory = Path(values.get("name_or_path") or values.get("_name_or_path") or "")
            config = model_of({**values, "model": model, "format_version": format_version}, directory)
        super().__init__(**{**values, **usual_values(config)})
        self.model = dataclasses.asdict(config)
        self.format_version = format_version
        self.auto_map = auto_map()

    def model_config(self) -> ModelConfig:
        """The configuration of our model. Raises HuggingFaceError where the values make none."""
        return model_of({"model": self.model, "format_version": self.format_version}, Path(self.name_or_path or ""))

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *arguments: Any, **settings: Any) -> None:
        super().save_pretrained(save_directory, *arguments, **settings)
        for name, text in PLUGIN.files.items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: transformers would save a copy of this file, which `auto_map` makes needless."""


@dataclass
class StateCache:
    """What a model has read, as `past_key_values`. Passes change it, so continue a copy (copy.deepcopy) to branch.

    Attributes:
        state: behind the last token; None: nothing was read.
        tokens: how many of each row were read, padding included.
    """

    state: ModelState | None = None
    tokens: int = 0

    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read; the same in all layers."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row beam_idx[i] has read: a step of beam search."""
        if self.state is not None:
            self.state = self.state.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def advance(self, state: ModelState, tokens: int) -> None:
        """`state` is behind `tokens` further ones."""
        # Further single tokens then update the memories where they lie; gradients need them as they were.
        self.state = state.for_decoding() if self.state is None and not torch.is_grad_enabled() else state
        self.tokens += tokens


class XLSTMPretrainForCausalLM(PreTrainedModel, GenerationMixin):
    """A LanguageModel, `model`, behind the interface of transformers."""

    config_class = XLSTMPretrainConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"model.lm_head.weight": "model.embedding.weight"}
    # What was read cannot be taken back: assisted generation is refused.
    _is_stateful = True

    def __init__(self, config: XLSTMPretrainConfig):
        super().__init__(config)
        self.model = LanguageModel(config.model_config())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with labels the loss.

        Args:
            input_ids: [B, S] int64, the tokens behind those of `past_key_values`.
            attention_mask: [B, T] with 0 at padding, also that of earlier calls; None: there is none. A row's tokens
                are one stretch, whose first token starts a document.
            past_key_values: of an earlier call, which this one changes; None: nothing was read.
            labels: [B, S], mostly `input_ids`; the logits at a token are scored with the label of the next one. -100 is
                not scored, nor is what padding predicts.
            use_cache: return what was read; None: unless the model is in training mode.
            logits_to_keep: so many at the end, 0 all; or their places.
            num_items_in_batch: divides the sum of the losses; None: the number of labels that are scored.
            return_dict: False gives a tuple.

        Raises:
            ValueError: an argument that this model cannot use.
        """
        _refuse(others)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels are scored with the logits of all tokens; leave logits_to_keep at 0")
        cache = StateCache() if past_key_values is None else past_key_values
        if not isinstance(cache, StateCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this model goes on from what it has returned itself, a "
                "StateCache"
            )
        n_tokens = input_ids.shape[1]
        starts = None if attention_mask is None else _document_starts(attention_mask, cache.tokens, n_tokens)
        keeps_state = not self.training if use_cache is None else use_cache
        before = cache.state
        if before is not None and not keeps_state:
            # Made for decoding, it would move on where it lies.
            before = before.map(torch.clone)
        logits, state = self._run(input_ids, starts, before, keeps_state, logits_to_keep)
        if state is not None:
            cache.advance(state, n_tokens)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else _loss(logits, labels, attention_mask, num_items_in_batch),
            logits=logits,
            past_key_values=cache if keeps_state else None,  # type: ignore[arg-type]
        )
        wants_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if wants_tuple else output

    def _run(
        self,
        tokens: Tensor,
        starts: Tensor | None,
        before: ModelState | None,
        keeps_state: bool,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, ModelState | None]:
        """Logits [B, those to keep, V], and the state behind the tokens if it is asked for."""
        if isinstance(logits_to_keep, int) and logits_to_keep == 1 and keeps_state:
            last, state = self.model.predict(tokens, document_start=starts, state=before)
            return last[:, None], state
        output = self.model(tokens, document_start=starts, state=before, return_state=keeps_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return output.logits[:, kept], output.state

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The first values, by our rules, of what no file has filled."""
        # Of a tied head the first name, the embedding's.
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        config, seed = self.config.model_config(), torch.initial_seed()
        for parameter in module.parameters(recurse=False):
            if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):
                parameter.copy_(initialise_parameter(config, names[id(parameter)], parameter.shape, seed))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> Any:
        raise ValueError("the vocabulary of this model is fixed; begin a new model with another model.vocab_size")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The first pass makes the StateCache.
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: as of XLSTMPretrainConfig."""


def _refuse(others: dict[str, Any]) -> None:
    """Raise ValueError for arguments that other models take and this one cannot use."""
    given = [key for key, value in others.items() if value is not None and value is not False]
    unusable = [key for key in given if key != _KNOWN_ALREADY]
    if unusable:
        raise ValueError(f"{', '.join(unusable)}: this model takes no such argument; leave it out")


def _document_starts(attention_mask: Tensor, seen: int, n_tokens: int) -> Tensor | None:
    """[B, S] bool, True where the first token behind a row's padding is; None: no token of this call is one."""
    if attention_mask.shape[1:] != (seen + n_tokens,) or attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be of whole numbers or bool and of shape [B, {seen + n_tokens}], for the {seen} "
            f"tokens that were read and the {n_tokens} of this call; it is {attention_mask.dtype} "
            f"{list(attention_mask.shape)}"
        )
    is_token = attention_mask.bool()
    if is_token.all():
        return None
    starts = is_token & ~F.pad(is_token, (1, 0))[:, :-1]
    if (starts.sum(1) > 1).any():
        raise ValueError(
            "attention_mask has padding between the tokens of a row, which would be read as tokens; pad prompts on the "
            "left (padding_side='left')"
        )
    new = starts[:, seen:]
    return new if new.any() else None


def _loss(
    logits: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """The mean loss in nats, as ModelOutput.loss has it."""
    targets = F.pad(labels[:, 1:], (0, 1), value=MASKED)
    if attention_mask is not None:
        targets = targets.masked_fill(attention_mask[:, -targets.shape[1] :] == 0, MASKED)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=MASKED, reduction="sum")
    return total / ((targets != MASKED).sum() if num_items_in_batch is None else num_items_in_batch)
