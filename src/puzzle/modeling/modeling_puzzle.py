"""A decoder whose layers differ, made of the parent family's own Hugging Face modules.

This file and `configuration_puzzle.py` travel inside every saved checkpoint, so they import nothing from the `puzzle`
package.
Parameter names are the family's own; a subblock that is `none` has no parameters, its norm included.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_puzzle import Block, PuzzleConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """The modules of one Hugging Face model family."""

    attention: type[nn.Module]
    mlp: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]


FAMILIES = {
    "llama": Family(attention=LlamaAttention, mlp=LlamaMLP, norm=LlamaRMSNorm, rotary=LlamaRotaryEmbedding),
}


class PuzzleLinearMixer(nn.Module):
    """One linear map in place of attention: each token attends to itself alone.

    Its name must not say attention: transformers takes a file with an attention class that does not call the attention
    interface itself for one whose implementation cannot be set.
    """

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class PuzzleLinearMLP(nn.Module):
    """One linear map in place of the FFN."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`, each half present, replaced or left out as `block` says.

    `cache_index` numbers the layers that have a KV cache.
    """

    def __init__(self, config: PuzzleConfig, block: Block, cache_index: int) -> None:
        super().__init__()
        norm = FAMILIES[config.base_model_type].norm
        attention, ffn = block["attention"], block["ffn"]
        self.has_attention = attention["kind"] != "none"
        self.has_ffn = ffn["kind"] != "none"
        if self.has_attention:
            self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.self_attn = _build_attention(config, attention, cache_index)
        if self.has_ffn:
            self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = _build_ffn(config, ffn)

    def attention_contribution(self, hidden_BTD: Tensor, **context: Any) -> Tensor:
        """What the attention half adds to the residual stream, [B, T, D]; call only if `has_attention`."""
        output_BTD, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_BTD), **context)
        return output_BTD

    def ffn_contribution(self, hidden_BTD: Tensor) -> Tensor:
        """What the FFN half adds to the residual stream, [B, T, D]; call only if `has_ffn`."""
        return self.mlp(self.post_attention_layernorm(hidden_BTD))

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        if self.has_attention:
            hidden_states = hidden_states + self.attention_contribution(hidden_states, **context)
        if self.has_ffn:
            hidden_states = hidden_states + self.ffn_contribution(hidden_states)
        return hidden_states


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class PuzzleModel(PuzzlePreTrainedModel):
    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        family = FAMILIES[config.base_model_type]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            PuzzleDecoderLayer(config, block, cache_index) for block, cache_index in _numbered(config.blocks or [])
        )
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family.rotary(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def context(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> dict[str, Any]:
        """What every layer is called with beside the hidden states: mask, positions, cache."""
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(hidden_BTD, position_ids=position_ids),
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions: a model whose layers differ returns no attention weights")
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        context = self.context(
            hidden_BTD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        states = [hidden_BTD] if output_hidden_states else None
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, **context, **kwargs)
            if states is not None:
                states.append(hidden_BTD)
        hidden_BTD = self.norm(hidden_BTD)
        if states is not None:
            states[-1] = hidden_BTD
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


def _build_attention(config: PuzzleConfig, entry: dict[str, Any], cache_index: int) -> nn.Module:
    match entry["kind"]:
        case "gqa":
            sized = _sized(config, num_key_value_heads=entry["num_key_value_heads"])
            attention = FAMILIES[config.base_model_type].attention(sized, cache_index)
            # From here on only the attention implementation is read, and that is set on the whole model.
            attention.config = config
            return attention
        case "linear":
            return PuzzleLinearMixer(config)
        case kind:
            raise ValueError(f"blocks: attention kind {kind!r} is unknown; use gqa, linear or none")


def _build_ffn(config: PuzzleConfig, entry: dict[str, Any]) -> nn.Module:
    match entry["kind"]:
        case "gated":
            return FAMILIES[config.base_model_type].mlp(_sized(config, intermediate_size=entry["intermediate_size"]))
        case "linear":
            return PuzzleLinearMLP(config)
        case kind:
            raise ValueError(f"blocks: ffn kind {kind!r} is unknown; use gated, linear or none")


def _sized(config: PuzzleConfig, **sizes: int) -> PuzzleConfig:
    """A copy of the configuration with one layer's own sizes, for a family module to read."""
    layer_config = copy.copy(config)
    layer_config.per_layer_config = None
    for name, value in sizes.items():
        setattr(layer_config, name, value)
    return layer_config


def _wants_dict(asked: bool | None, config: PuzzleConfig) -> bool:
    return bool(config.return_dict if asked is None else asked)


def _numbered(blocks: list[Block]) -> Iterator[tuple[Block, int]]:
    """Each block with its KV cache index: the number of cached layers before it."""
    cache_index = 0
    for block in blocks:
        yield block, cache_index
        cache_index += block["attention"]["kind"] == "gqa"
