"""Grouped-query attention: the parent variant, fewer KV heads, sliding windows (paper appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant, register

_KV = ("self_attn.k_proj.", "self_attn.v_proj.")


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
    output_projection = "self_attn.o_proj"
    setting = "kv_heads"
    num_key_value_heads: int
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.num_key_value_heads < 1 or (self.sinks if self.window is None else self.window < 2):
            raise ValueError("KV heads are at least 1, a window has at least 2 tokens, and only a window has sinks")

    def kv_bytes(self, config: PuzzleConfig, tokens: int, dtype: torch.dtype) -> int:
        """A window caches one token less than it has: the last one is the next token itself."""
        assert config.head_dim is not None
        return 2 * self.num_key_value_heads * config.head_dim * self._held(tokens) * dtype.itemsize

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
        """KV heads are halved while that is possible, then divided by their smallest factor: 6 gives 3, 1."""
        counts, count = [], self.num_key_value_heads
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

    def initialise(self, parent: ParentSubblock) -> State:
        """The parent's weights; each KV head is the mean of those that become one (paper appendix A)."""
        assert isinstance(parent.variant, GroupedQuery)
        new_heads, merged = self.num_key_value_heads, parent.variant.num_key_value_heads // self.num_key_value_heads
        means = {
            name: parent.state[name].unflatten(0, (new_heads, merged, -1)).double().mean(1).flatten(0, 1)
            for name in parent.state
            if name.startswith(_KV)
        }
        return parent.state | {name: mean.to(parent.dtype) for name, mean in means.items()}

    def widen(self, state: State, wider: Variant) -> State | None:
        if not isinstance(wider, GroupedQuery) or (wider.window, wider.sinks) != (self.window, self.sinks):
            return None
        repeats, rest = divmod(wider.num_key_value_heads, self.num_key_value_heads)
        if rest:
            return None
        kv = (name for name in state if name.startswith(_KV))
        return state | {name: _repeated(state[name], self.num_key_value_heads, repeats) for name in kv}

    def linear_map(self, state: State) -> tuple[Tensor, Tensor | None]:
        """W_o W_v: each token attends to itself alone; the V heads are repeated for the query heads that read them."""
        output, value = state["self_attn.o_proj.weight"].double(), state["self_attn.v_proj.weight"].double()
        repeats = output.shape[1] // value.shape[0]
        weight = output @ _repeated(value, self.num_key_value_heads, repeats)
        bias = state.get("self_attn.o_proj.bias")
        if (value_bias := state.get("self_attn.v_proj.bias")) is not None:
            through = output @ _repeated(value_bias.double(), self.num_key_value_heads, repeats)
            bias = through if bias is None else through + bias.double()
        return weight, bias

    def _held(self, tokens: int) -> int:
        """Number of tokens whose keys and values are cached after `tokens`."""
        return tokens if self.window is None else min(tokens, self.sinks + self.window - 1)

    def _reach(self, config: PuzzleConfig) -> int:
        """Largest number of tokens that a token attends to."""
        limit: int = config.max_position_embeddings
        return limit if self.window is None else min(limit, self.window + self.sinks)


def _repeated(tensor: Tensor, heads: int, repeats: int) -> Tensor:
    """[heads * head_dim, ...] -> [heads * repeats * head_dim, ...], each head repeated `repeats` times in a row."""
    return tensor.unflatten(0, (heads, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
