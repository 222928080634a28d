"""A decoder whose layers differ, made of the parent family's own Hugging Face layers.

A layer of nearly every family is `x + m * post(f(pre(x)))` twice, for attention and FFN, with a norm before or after
the subblock, or both, and mostly m = 1. So a layer here is the family's own, built from the parent's configuration with
this layer's sizes, from which the subblocks that are absent or replaced are taken away. There is no code for a family.

This file and `configuration_puzzle.py` travel inside every checkpoint: they import nothing from the `puzzle` package.
Parameter names are the family's own; a subblock that is `none` has no parameters, its norms included.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

import copy
import inspect
import json
import sys
from functools import lru_cache, partial
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_puzzle import Block, PuzzleConfig, has_cache

_EPSILON = 1e-6
Form = dict[str, tuple[str | None, str | None]]
"""The names of the norms before and after each subblock, as far as there are any."""
FORMS: tuple[Form, ...] = (
    {
        "attention": ("input_layernorm", "post_self_attn_layernorm"),
        "ffn": ("post_attention_layernorm", "post_mlp_layernorm"),
    },
    {
        "attention": ("input_layernorm", "post_attention_layernorm"),
        "ffn": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
    {"attention": (None, "post_attention_layernorm"), "ffn": (None, "post_feedforward_layernorm")},
    {"attention": ("attention_layernorm", None), "ffn": ("feedforward_layernorm", None)},
    {"attention": ("input_layernorm", None), "ffn": ("post_attention_layernorm", None)},
)
"""What families call the norms before and after each subblock: the first form that has just a layer's norms is its."""
MODULE_NAMES = {"attention": "self_attn", "ffn": "mlp"}
"""What a layer calls its subblocks' modules, of whatever kind."""
OWN_NORMS = {"attention": "attention_norm", "ffn": "ffn_norm"}
"""The norms before subblocks of other kinds, where the family has none before its own."""
MODULES: dict[tuple[str, str], type[nn.Module]] = {}
"""Classes of the kinds that are not the family's own, by subblock and kind, built as `cls(config, entry)` from an entry
of `config.blocks`. Such attention takes `hidden_states` and keywords, returns a pair `(output, None)`, and has no KV
cache. At the end of this file a checkpoint carries all that were known when it was written."""


class LayerConfig:
    """One layer's view of the family's configuration: its own sizes, and the model's attention implementation."""

    def __init__(self, config: PuzzleConfig, family: Any, **sizes: Any) -> None:
        self.__dict__.update(sizes, _of_model=config, _of_family=family)

    def __getattr__(self, name: str) -> Any:
        if name in ("_of_model", "_of_family") or name.startswith("__"):  # asked for while it is copied
            raise AttributeError(name)
        followed = name.startswith(("_attn_implementation", "_experts_implementation"))
        return getattr(self._of_model if followed else self._of_family, name)


@lru_cache(maxsize=64)
def _parsed(model_type: str, fields: str) -> Any:
    return AutoConfig.for_model(model_type, **json.loads(fields))


def family_config(config: PuzzleConfig) -> Any:
    """The parent's own configuration, as its family's class; shared, so not to be changed."""
    return _parsed(config.base_model_type, json.dumps(config.parent, sort_keys=True))


def family_layer(config: PuzzleConfig, index: int, **sizes: Any) -> nn.Module:
    """Layer `index` of the family's own model, in these sizes."""
    family = family_config(config)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(family)]
    layer_class = getattr(sys.modules[causal.__module__], causal._no_split_modules[0])
    return layer_class(LayerConfig(config, family, **sizes), index)


def family_without_layers(config: PuzzleConfig, **changed: Any) -> Any:
    """The family's own model without any layer: embeddings, final norm, rotary."""
    family = copy.deepcopy(family_config(config))
    for name, value in (changed | {"num_hidden_layers": 0}).items():
        setattr(family, name, value)
    return MODEL_MAPPING[type(family)](family)


def rotary_type(family: Any, index: int) -> str | None:
    """The type of a layer by which its rotary embedding is chosen, if the family has several."""
    module = sys.modules[MODEL_MAPPING[type(family)].__module__]
    rotaries = (value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))
    if any("layer_type" in inspect.signature(rotary.forward).parameters for rotary in rotaries):
        return str(family.layer_types[index])
    return None


@lru_cache(maxsize=64)
def _form(model_type: str, fields: str) -> Form:
    config = PuzzleConfig(base_model_type=model_type, parent=json.loads(fields), blocks=[])
    with torch.device("meta"):
        return form_of(family_layer(config, 0))


def family_form(config: PuzzleConfig) -> Form:
    """`form_of` the family's layers."""
    return _form(config.base_model_type, json.dumps(config.parent, sort_keys=True))


def form_of(layer: nn.Module) -> Form:
    """A layer's form; a `ValueError` if it is none that is known."""
    norms = {name for name, _ in layer.named_children() if "norm" in name}
    for form in FORMS:
        if norms == {name for names in form.values() for name in names if name}:
            return form
    if len(norms) == 1:
        raise ValueError(f"its layers add both subblocks at once: they have one norm, {norms.pop()}")
    found = ", ".join(sorted(norms)) or "named otherwise"
    raise ValueError(f"its layers are of no known form: their norms are {found}")


class PuzzleSinkCacheLayer(DynamicLayer):
    """Keys and values of a sequence's first `sinks` and last `window` - 1 tokens: the next one makes the window full.

    They are in the order of the tokens, so until one is dropped it holds what any cache would.
    """

    is_sliding = True
    is_croppable = False

    keys: Tensor
    values: Tensor

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.sinks, self.recent = sinks, window - 1
        self.cumulative_length = 0

    @property
    def dropped(self) -> int:
        """How many tokens, all of them between the sinks and the window."""
        return max(0, self.cumulative_length - self.sinks - self.recent)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values that these tokens attend to: all that were held, then their own; the too old are dropped."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys_BHTD = torch.cat([self.keys, key_states], dim=-2)
        values_BHTD = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = self._held(keys_BHTD), self._held(values_BHTD)
        return keys_BHTD, values_BHTD

    def _held(self, states_BHTD: Tensor) -> Tensor:
        dropped_until = states_BHTD.shape[-2] - self.recent
        if dropped_until <= self.sinks:
            return states_BHTD
        return torch.cat([states_BHTD[:, :, : self.sinks], states_BHTD[:, :, dropped_until:]], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length - self.dropped + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a cache layer with sinks cannot be cropped: what it dropped does not come back")


def _mask_name(window: int | None, sinks: int) -> str:
    """`full_attention`, `window1024s4`."""
    return "full_attention" if window is None else f"window{window}s{sinks}"


class PuzzleMasks:
    """The attention masks of one forward, one for each window and number of sinks, made when a layer first asks for it.

    Args:
        attention_mask: of padding, [B, tokens seen and T]; or masks made before: one for every layer, [B, 1, T, keys],
            or the `made` of another.
        packed: whether positions start anew within a sequence, where documents do; otherwise the device is asked.
    """

    def __init__(
        self,
        config: PuzzleConfig,
        hidden_BTD: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        packed: bool = False,
    ) -> None:
        self.made: dict[str, Any] = attention_mask if isinstance(attention_mask, dict) else {}
        """By `_mask_name`."""
        self._config, self._cache, self._tokens = config, cache, hidden_BTD.shape[1]
        self._padding, self._packed = None if isinstance(attention_mask, dict) else attention_mask, packed
        self._arguments: dict[str, Any] = {"inputs_embeds": hidden_BTD, "past_key_values": cache}
        self._arguments["position_ids"] = position_ids

    def of(self, window: int | None, sinks: int = 0, cache_index: int = 0) -> Any:
        """The mask over the keys of a layer's cache as the attention implementation takes it, None if it needs none."""
        name = _mask_name(window, sinks)
        if name in self.made:
            return self.made[name]
        if self._packed or (window and sinks and (self._padding is None or self._padding.ndim == 2)):
            mask = self._make(window, sinks, cache_index)
        elif window is None:
            mask = create_causal_mask(config=self._config, attention_mask=self._padding, **self._arguments)
        else:
            arguments = {"attention_mask": self._padding, "layer_idx": cache_index, **self._arguments}
            config = LayerConfig(self._config, self._config, sliding_window=window)
            mask = create_sliding_window_causal_mask(config, **arguments)
        self.made[name] = mask
        return mask

    def _make(self, window: int | None, sinks: int, cache_index: int) -> Any:
        """The mask over the keys that there are, of which some between sinks and window may have been dropped."""
        if (found := self._config._attn_implementation) not in ("eager", "sdpa", "flex_attention"):
            use = "use sdpa, eager or flex_attention, or variants without sinks"
            raise ValueError(f"attn_implementation: {found!r} knows no attention sinks; {use}")
        padding = self._padding
        if padding is not None and not padding[:, 0].all():
            found = "padding on the left would take the place of the first tokens, which attention sinks keep"
            raise ValueError(f"attention_mask: {found}; pad on the right, or generate one sequence at a time")
        keys, dropped = self._tokens, 0
        if self._cache is not None:
            keys, _ = self._cache.get_mask_sizes(self._tokens, cache_index)
            dropped = sum(getattr(layer, "dropped", 0) for layer in self._cache.layers[cache_index : cache_index + 1])
        if padding is not None and dropped:
            padding = torch.cat([padding[:, :sinks], padding[:, sinks + dropped :]], dim=1)

        arguments, positions_BT = self._arguments, self._arguments["position_ids"]
        packed = positions_BT is not None and self._cache is None and padding is None
        if packed:  # each document has sinks of its own, of which transformers before 5.23 knew nothing
            positions_BT = positions_BT.expand(len(arguments["inputs_embeds"]), -1)
            documents_BT = (positions_BT.diff(dim=1, prepend=positions_BT[:, :1] - 1) != 1).cumsum(1)
            arguments = arguments | {"position_ids": None}

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            token = key + dropped
            near = token <= query if window is None else (token <= query) & (token > query - window)
            if not packed:
                return (key < sinks) | near
            own = documents_BT[batch, key] == documents_BT[batch, query]
            return own & ((positions_BT[batch, key] < sinks) | near)

        return create_causal_mask(
            config=self._config,
            attention_mask=padding,
            # What follows from the order of tokens alone, also if some were dropped, needs no mask to be built.
            and_mask_function=visible if packed or (window and keys > window + sinks) else None,
            layer_idx=cache_index,
            **arguments,
        )


class PuzzleDecoderLayer(GradientCheckpointingLayer):
    """`x + m * post(attention(pre(x)))`, and so the FFN, each present, replaced or left out as `block` says.

    `index`: the parent's layer that it is one of, whose rules it follows. `cache_index`: how many layers before it have
    a KV cache. `window`: how many tokens attention sees, the token itself included, None for all. `sinks`: how many of
    the sequence's first tokens it sees besides.
    """

    def __init__(self, config: PuzzleConfig, block: Block, index: int, cache_index: int) -> None:
        super().__init__()
        attention = block["attention"]
        self.window: int | None = attention.get("window") if has_cache(attention) else None
        self.sinks: int = attention.get("sinks", 0)
        self.cache_index = cache_index
        # Without a window of its own it is what the parent's layer is, to which the model's may say something else.
        sizes: dict[str, Any] = {} if self.window is None else {"sliding_window": self.window}
        for which, entry in block.items():
            if (which, entry["kind"]) not in MODULES:
                sizes |= {name: size for name, size in entry.items() if name not in ("kind", "type", "window", "sinks")}
        if "num_attention_heads" in sizes:  # by which families divide, where they say no size of heads
            sizes["head_dim"] = config.head_dim
        own = family_layer(config, index, **sizes)
        self.multiplier: float = getattr(own, "residual_multiplier", 1.0)
        self.rotary_type = rotary_type(family_config(config), index)
        self.norm_names: Form = {}
        """Of the subblocks that are there."""
        for which, norms in form_of(own).items():
            kind, name = block[which]["kind"], MODULE_NAMES[which]
            if kind == "none":
                continue
            module = own.get_submodule(name)
            if (which, kind) in MODULES:
                bias = any(parameter.endswith(".bias") for parameter, _ in module.named_parameters())
                view = LayerConfig(config, family_config(config), attention_bias=bias, mlp_bias=bias)
                module, norms = MODULES[which, kind](view, block[which]), (norms[0] or OWN_NORMS[which], None)
            elif (which, kind) not in (("attention", "gqa"), ("ffn", "gated"), ("ffn", "experts")):  # the family's own
                raise ValueError(f"blocks: {which} kind {kind!r} is unknown; import the module that registers it first")
            for norm in filter(None, norms):
                setattr(self, norm, getattr(own, norm, None) or nn.RMSNorm(config.hidden_size, eps=_EPSILON))
            setattr(self, name, module)
            self.norm_names[which] = norms
        if has_cache(attention):
            self.self_attn.layer_idx = cache_index
            if self.window is not None and hasattr(self.self_attn, "sliding_window"):
                self.self_attn.sliding_window = self.window
        self._gives_window = self.window is not None and not _gives_window_itself(self.self_attn)

    @property
    def mask_name(self) -> str:
        """Which of `PuzzleMasks.made` its attention takes."""
        return _mask_name(self.window, self.sinks)

    def normed(self, which: str, hidden_BTD: Tensor) -> Tensor:
        """What a linear map in the place of a subblock reads: the normed input, also where the family norms none."""
        if (norm := self.norm_names[which][0]) is None:
            return nn.functional.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=_EPSILON)
        output_BTD: Tensor = getattr(self, norm)(hidden_BTD)
        return output_BTD

    def subblock_output(self, which: str, hidden_BTD: Tensor, masks: Any = None, **context: Any) -> Tensor:
        """What a subblock adds to the residual stream, [B, T, D]; zeros where it is left out."""
        if which not in self.norm_names:
            return torch.zeros_like(hidden_BTD)
        before, after = self.norm_names[which]
        if before is not None:
            hidden_BTD = getattr(self, before)(hidden_BTD)
        if which == "ffn":
            output_BTD = self.mlp(hidden_BTD)
        else:
            if self.window is not None:
                context["attention_mask"] = masks.of(self.window, self.sinks, self.cache_index)
            if self._gives_window:
                context["sliding_window"] = self.window  # read by implementations that take no such masks
            context["position_embeddings"] = context["position_embeddings"][self.rotary_type]
            output_BTD = self.self_attn(hidden_states=hidden_BTD, **context)
        if isinstance(output_BTD, tuple):  # with attention weights, or a router's scores
            output_BTD = output_BTD[0]
        if after is not None:
            output_BTD = getattr(self, after)(output_BTD)
        return output_BTD if self.multiplier == 1 else output_BTD * self.multiplier

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        for which in self.norm_names:
            hidden_states = hidden_states + self.subblock_output(which, hidden_states, **context)
        return hidden_states


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits that stay below `cap` (Gemma 2), or as they are."""
    return torch.tanh(logits / cap) * cap if cap else logits


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PuzzleDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the family's experts ask the configuration, as its attention does

    @property
    def family(self) -> Any:
        """The class of the family's own model."""
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(family_config(self.config))]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the family's own models: also of buffers that no checkpoint holds, such as scales of embeddings."""
        family = self.family.__new__(self.family)
        nn.Module.__init__(family)
        family.config = family_config(self.config)
        family._init_weights(module)

    @property
    def _supports_sdpa(self) -> bool:
        return bool(self.family._supports_sdpa)

    @property
    def _supports_flash_attn(self) -> bool:
        return bool(self.family._supports_flash_attn)

    @property
    def _supports_flex_attn(self) -> bool:
        return bool(self.family._supports_flex_attn)


class PuzzleModel(PuzzlePreTrainedModel):
    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        family, blocks = family_config(config), config.blocks or []
        outer = family_without_layers(config)
        self.embed_tokens, self.norm, self.rotary_emb = outer.embed_tokens, outer.norm, outer.rotary_emb
        self.embedding_multiplier: float = getattr(family, "embedding_multiplier", 1.0)
        cache_indices = accumulate((has_cache(block["attention"]) for block in blocks), initial=0)
        self.layers: Any = nn.ModuleList(map(partial(PuzzleDecoderLayer, config), blocks, count(), cache_indices))
        self.gradient_checkpointing = False
        self.post_init()

    def scaled(self, embeddings_BTD: Tensor) -> Tensor:
        """What enters the first layer, [B, T, D]."""
        return embeddings_BTD if self.embedding_multiplier == 1 else embeddings_BTD * self.embedding_multiplier

    def context(
        self,
        hidden_BTD: Tensor,
        *,
        attention_mask: Tensor | dict[str, Any] | PuzzleMasks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> dict[str, Any]:
        """What every layer is called with beside the hidden states: masks, positions, cache.

        Without positions, padding and cache nothing is read back from the device. With positions it is asked whether
        they start anew within a sequence (packed documents), which needs a mask, unless `PuzzleMasks` know it.
        """
        masks = attention_mask
        if not isinstance(masks, PuzzleMasks):
            masks = PuzzleMasks(self.config, hidden_BTD, masks, position_ids, past_key_values)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden_BTD.shape[1], device=hidden_BTD.device).unsqueeze(0)
        types = dict.fromkeys(layer.rotary_type for layer in self.layers)
        return {
            "masks": masks,
            "attention_mask": masks.of(None),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": {
                name: self.rotary_emb(hidden_BTD, position_ids=position_ids, **({"layer_type": name} if name else {}))
                for name in types
            },
        }

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | PuzzleMasks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions: a model whose layers differ returns no attention weights")
        hidden_BTD = self.scaled(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._bound_caches_with_sinks(past_key_values)
        context = self.context(
            hidden_BTD, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values
        )
        states = []
        for layer in self.layers:
            states += [hidden_BTD] if output_hidden_states else []
            hidden_BTD = layer(hidden_BTD, **context, **kwargs)
        hidden_BTD = self.norm(hidden_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden_BTD) if output_hidden_states else None,
        )

    def _bound_caches_with_sinks(self, cache: Cache | None) -> None:
        """Put cache layers that drop what is never seen again in place of growing ones that are still empty.

        No configuration of transformers can ask for them. Other caches, such as static ones, keep every token.
        """
        held = [] if cache is None else cache.layers
        for layer in self.layers:
            if layer.sinks and layer.cache_index < len(held):
                found = held[layer.cache_index]
                if type(found) is DynamicLayer and not found.is_initialized:
                    held[layer.cache_index] = PuzzleSinkCacheLayer(layer.window, layer.sinks)


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first layer, [B, T, D]."""
        return self.model.scaled(self.model.embed_tokens(tokens_BT))

    def final_norm(self, hidden_BTD: Tensor) -> Tensor:
        """What enters the head, from what leaves the last layer; its products are the logits, but for `cap`."""
        return self.divided(self.model.norm(hidden_BTD))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits from what leaves the last layer, [B, T, V]."""
        return self._of_head(self.lm_head(self.model.norm(hidden_BTD)))

    @property
    def cap(self) -> float | None:
        """What the family bounds logits by (`capped`)."""
        return getattr(family_config(self.config), "final_logit_softcapping", None)

    def divided(self, values: Tensor) -> Tensor:
        """By the family's divisor of logits, if it has one."""
        divisor: float = getattr(family_config(self.config), "logits_scaling", 1)
        return values if divisor == 1 else values / divisor

    def _of_head(self, products: Tensor) -> Tensor:
        return capped(self.divided(products), self.cap)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | PuzzleMasks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        arguments = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*arguments, **kwargs | {"return_dict": True})
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self._of_head(self.lm_head(outputs.last_hidden_state[:, kept, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def create_masks_for_generate(
        self, config: PuzzleConfig, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Every mask that a step needs, by name; transformers asks for them before a step that may be compiled."""
        masks = PuzzleMasks(config, inputs_embeds, attention_mask, kwargs.get("position_ids"), past_key_values)
        masks.of(None)
        for layer in self.model.layers:
            if layer.window is not None:
                masks.of(layer.window, layer.sinks, layer.cache_index)
        return masks.made


def _gives_window_itself(attention: nn.Module) -> bool:
    """Whether an attention's own code hands `sliding_window` to the attention function, which takes it only once."""
    code = inspect.unwrap(type(attention).forward).__code__
    return any("sliding_window" in names for names in code.co_consts if isinstance(names, tuple))
