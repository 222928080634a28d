"""Configuration of a Puzzle model: a decoder whose layers differ.

This file and `modeling_puzzle.py` travel inside every checkpoint: they import nothing from the `puzzle` package.

`blocks` describes the real stack, one entry a layer. `num_hidden_layers` counts only the layers that keep an attention
with a KV cache, and `per_layer_config` (their KV heads) is keyed by that count. Engines size their caches by these two,
so an attention-free layer, even layer 0, needs no special case in `generate` or in vLLM's Transformers backend.
Where there are sliding windows, `layer_types` and `sliding_window` say so in transformers' own terms, which engines
read. Of a window with sinks they know nothing: to them it is full attention, whose cache the model bounds by itself.
"""

from typing import Any

import transformers

try:
    from transformers import PreTrainedConfig
except ImportError:
    raise ImportError(f"a Puzzle model requires transformers >= 5.19, found {transformers.__version__}") from None

Block = dict[str, dict[str, Any]]
"""`{"attention": {"kind": "gqa", "num_key_value_heads": 2}, "ffn": {"kind": "gated", "intermediate_size": 512}}`.

`gqa` and `gated` are the family's own attention and FFN in these sizes, `none` is a subblock left out, and other kinds
are in `modeling_puzzle.MODULES`. An attention with a sliding `window` (its number of tokens, the token itself included)
may have `sinks`: how many of the first tokens stay visible. Fewer query heads are its `num_attention_heads`."""


def has_cache(attention: dict[str, Any]) -> bool:
    """Whether an attention's entry is of a kind that keeps keys and values."""
    return attention["kind"] == "gqa"


class PuzzleConfig(PreTrainedConfig):
    """Everything of the parent's configuration, plus `blocks`.

    `base_model_type` names the family whose attention, MLP, norm and rotary classes the layers are made of.
    `num_key_value_heads` and `intermediate_size` are the parent's; each block carries its own.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_type: str = "llama"
    parent: dict[str, Any] | None = None
    """The parent's own configuration, as it was; None: that of the fields below."""
    blocks: list[dict[str, Any]] | None = None
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.parent is None:
            own = ("base_model_type", "parent", "blocks")
            given = {name: getattr(self, name) for name in PuzzleConfig.__annotations__ if name not in own} | kwargs
            given["num_hidden_layers"] = self.num_hidden_layers if self.blocks is None else len(self.blocks)
            self.parent = {name: value for name, value in given.items() if value is not None}
        if self.blocks is None:
            self.blocks = [
                {
                    "attention": {"kind": "gqa", "num_key_value_heads": self.num_key_value_heads},
                    "ffn": {"kind": "gated", "intermediate_size": self.intermediate_size},
                }
                for _ in range(self.num_hidden_layers)
            ]
        attentions = [block["attention"] for block in self.blocks if has_cache(block["attention"])]
        self.num_hidden_layers = len(attentions)
        if scaling := kwargs.get("logits_scaling"):  # vLLM knows this factor by the other name alone
            kwargs["logit_scale"] = 1 / scaling
        # Derived from the blocks: what a configuration with other blocks may have carried is gone.
        for derived in ("layer_types", "sliding_window"):
            kwargs.pop(derived, None)
        overrides = [{"num_key_value_heads": attention["num_key_value_heads"]} for attention in attentions]
        if any("num_attention_heads" in attention for attention in attentions):
            for layer, attention in zip(overrides, attentions, strict=True):
                layer["num_attention_heads"] = attention.get("num_attention_heads", self.num_attention_heads)
        windows = [None if attention.get("sinks") else attention.get("window") for attention in attentions]
        if any(windows):
            kwargs["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
            kwargs["sliding_window"] = next(filter(None, windows))
            for layer, window in zip(overrides, windows, strict=True):
                layer["sliding_window"] = window or kwargs["sliding_window"]
        kwargs["per_layer_config"] = dict(enumerate(overrides))
        super().__post_init__(**kwargs)

    @property
    def num_layers(self) -> int:
        """The number of layers, with a KV cache or not."""
        return len(self.blocks or [])
