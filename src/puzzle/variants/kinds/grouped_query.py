"""Grouped-query attention: the parent variant, fewer KV heads, sliding windows (paper appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig, family_config
from puzzle.variants.base import Axis, ParentSubblock, State, Variant, axes, register


@register
@dataclass(frozen=True)
class GroupedQuery(Variant):
    """The family's attention with `num_key_value_heads`; with the parent's sizes, the parent variant.

    Attributes:
        window: how many of the most recent tokens a token attends to, itself included, at least 2; None: to all.
        sinks: how many of the sequence's first tokens it attends to besides (Xiao et al. 2024).
    """

    subblock = "attention"
    kind = "gqa"
    grammar = "kv{num_key_value_heads}[win{window}][s{sinks}]"
    setting = "kv_heads"
    num_key_value_heads: int
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.num_key_value_heads < 1 or (self.sinks if self.window is None else self.window < 2):
            raise ValueError("KV heads are at least 1, a window has at least 2 tokens, and only a window has sinks")

    def kv_bytes(self, config: PuzzleConfig, tokens: int, dtype: torch.dtype) -> int:
        """A window caches one token less than it has: the last one is the next token itself.

        Latent attention (DeepSeek-V2) caches its latents, however many heads there are.
        """
        family = family_config(config)
        if latents := getattr(family, "kv_lora_rank", None):
            values = latents + family.qk_rope_head_dim
        else:
            values = 2 * self.num_key_value_heads * (config.head_dim or 0)
        return values * self._held(tokens) * dtype.itemsize

    def operations(self, config: PuzzleConfig, new: int, context: int) -> float:
        """Matrices, and each query with the keys that it sees, which are multiplied twice."""
        assert config.head_dim is not None
        first, seen = context - new + 1, self._held(context)
        growing = max(0, min(context, seen) - first + 1)  # queries that see every token before them
        pairs = growing * (2 * first + growing - 1) / 2 + (new - growing) * seen
        return super().operations(config, new, context) + 4.0 * pairs * config.num_attention_heads * config.head_dim

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        """Fewer KV heads, which divide the parent variant's, a shorter reach, or both."""
        if not isinstance(parent, GroupedQuery) or parent.num_key_value_heads % self.num_key_value_heads:
            return False
        if (self.window, self.sinks) == (parent.window, parent.sinks):
            return self.num_key_value_heads < parent.num_key_value_heads
        return self._reach(config) < parent._reach(config)

    def alternatives(self, config: PuzzleConfig, sizes: Sequence[int] | None = None) -> list[Variant]:
        """KV heads are halved while that is possible, then divided by their smallest factor: 6 gives 3, 1.

        None where they are no sizes, as in latent attention.
        """
        counts, count = [], self.num_key_value_heads if self._axes(config) else 1
        while count > 1:
            count //= next(factor for factor in range(2, count + 1) if count % factor == 0)
            counts.append(count)
        chosen = sorted(counts if sizes is None else sizes, reverse=True)
        return [replace(self, num_key_value_heads=count) for count in chosen]

    @property
    def cell(self) -> str:
        if self.window is None:
            return "fewer KV heads"
        return "window with sinks" if self.sinks else "window"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        heads = config.num_attention_heads // self.num_key_value_heads
        return {"n_heads_in_group": heads} if self.window is None else None

    def output_projection(self, config: PuzzleConfig) -> str:
        return "self_attn.o_proj"

    def initialise(self, parent: ParentSubblock) -> State:
        """The parent's weights; each KV head is the mean of those that become one (paper appendix A)."""
        assert isinstance(parent.variant, GroupedQuery)
        heads = self.num_key_value_heads

        def means(units: Tensor) -> Tensor:
            return units.unflatten(1, (heads, -1)).double().mean(2).to(units.dtype)

        kv = parent.variant._axes(parent.config)
        return parent.state | {name: axis.mapped(parent.state[name], means) for name, axis in kv.items()}

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GroupedQuery) or (wider.window, wider.sinks) != (self.window, self.sinks):
            return None
        repeats, rest = divmod(wider.num_key_value_heads, self.num_key_value_heads)
        if rest:
            return None

        def repeated(units: Tensor) -> Tensor:
            return units.repeat_interleave(repeats, 1)

        return state | {name: axis.mapped(state[name], repeated) for name, axis in self._axes(config).items()}

    def linear_map(self, state: State, config: PuzzleConfig) -> tuple[Tensor, Tensor | None] | None:
        """W_o W_v: each token attends to itself alone; the V heads are repeated for the query heads that read them."""
        *_, value = (name for name in self._axes(config) if name.endswith("_proj.weight"))
        output = state["self_attn.o_proj.weight"].double()
        rows = (
            output.shape[1] * self.num_key_value_heads // config.num_attention_heads
        )  # of V, the last of a joint matrix

        def repeated(tensor: Tensor) -> Tensor:
            heads = tensor[-rows:].double().unflatten(0, (self.num_key_value_heads, -1))
            return heads.repeat_interleave(config.num_attention_heads // self.num_key_value_heads, 0).flatten(0, 1)

        weight, bias = output @ repeated(state[value]), state.get("self_attn.o_proj.bias")
        if (value_bias := state.get(value.replace(".weight", ".bias"))) is not None:
            through = output @ repeated(value_bias)
            bias = through if bias is None else through + bias.double()
        return weight, bias

    def _axes(self, config: PuzzleConfig) -> dict[str, Axis]:
        """Tensors that have a part for each KV head."""
        other = config.num_attention_heads if self.num_key_value_heads == 1 else 1
        return axes(self, replace(self, num_key_value_heads=other), config, config.head_dim or 1)

    def _held(self, tokens: int) -> int:
        """Number of tokens whose keys and values are cached after `tokens`."""
        return tokens if self.window is None else min(tokens, self.sinks + self.window - 1)

    def _reach(self, config: PuzzleConfig) -> int:
        """Largest number of tokens that a token attends to."""
        limit: int = config.max_position_embeddings
        return limit if self.window is None else min(limit, self.window + self.sinks)
