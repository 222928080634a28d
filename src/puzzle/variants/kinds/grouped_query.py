"""Grouped-query attention: the parent variant, fewer KV heads, sliding windows (paper appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig, family_config
from puzzle.variants.base import Axis, ParentSubblock, State, Variant, axes, register
from puzzle.variants.least_squares import least_squares_update, rank_blocks


@register
@dataclass(frozen=True)
class GroupedQuery(Variant):
    """The family's attention with `num_key_value_heads`; with the parent's sizes, the parent variant.

    Attributes:
        window: how many of the most recent tokens a token attends to, itself included, at least 2; None: to all.
        sinks: how many of the sequence's first tokens it attends to besides (Xiao et al. 2024).
        num_attention_heads: of queries; None: as many as the parent has.
    """

    subblock = "attention"
    kind = "gqa"
    grammar = "kv{num_key_value_heads}[q{num_attention_heads}][win{window}][s{sinks}]"
    setting = "kv_heads"
    num_key_value_heads: int
    window: int | None = None
    sinks: int = 0
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads < 1 or (self.sinks if self.window is None else self.window < 2):
            raise ValueError("KV heads are at least 1, a window has at least 2 tokens, and only a window has sinks")

    def kv_bytes(self, config: PuzzleConfig, tokens: int, dtype: torch.dtype, beyond_window: int = 0) -> int:
        """A window caches one token less than it has: the last one is the next token itself.

        Latent attention (DeepSeek-V2) caches its latents, however many heads there are.
        """
        family = family_config(config)
        if latents := getattr(family, "kv_lora_rank", None):
            values = latents + family.qk_rope_head_dim
        else:
            values = 2 * self.num_key_value_heads * (config.head_dim or 0)
        return values * self._held(tokens, beyond_window) * dtype.itemsize

    def operations(self, config: PuzzleConfig, new: int, context: int) -> float:
        """Matrices, and each query with the keys that it sees, which are multiplied twice."""
        assert config.head_dim is not None
        first, seen = context - new + 1, self._held(context)
        growing = max(0, min(context, seen) - first + 1)  # queries that see every token before them
        pairs = growing * (2 * first + growing - 1) / 2 + (new - growing) * seen
        return super().operations(config, new, context) + 4.0 * pairs * self._heads(config) * config.head_dim

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        """Fewer KV heads, which divide the parent variant's, a shorter reach, fewer query heads, or some of these.

        Query heads are given up in all groups alike, or with the KV head that they read: as many to a KV head as in the
        parent variant.
        """
        if not isinstance(parent, GroupedQuery) or parent.num_key_value_heads % self.num_key_value_heads:
            return False
        heads, of_parent = self._heads(config), parent._heads(config)
        if heads < of_parent:
            whole = heads * parent.num_key_value_heads == of_parent * self.num_key_value_heads
            alike = self.num_key_value_heads == parent.num_key_value_heads and heads % self.num_key_value_heads == 0
            if not (whole or alike) or not parent._query_axes(config):
                return False
        elif heads > of_parent:
            return False
        if (self.window, self.sinks) == (parent.window, parent.sinks):
            return (self.num_key_value_heads, heads) != (parent.num_key_value_heads, of_parent)
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
            return "fewer KV heads" if self.num_attention_heads is None else "fewer query heads"
        return "window with sinks" if self.sinks else "window"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        heads = self._heads(config) // self.num_key_value_heads
        return {"n_heads_in_group": heads} if self.cell == "fewer KV heads" else None

    def output_projection(self, config: PuzzleConfig) -> str:
        return "self_attn.o_proj"

    def recorded(self, config: PuzzleConfig) -> str | None:
        return self.output_projection(config) if self._query_axes(config) else None

    def initialise(self, parent: ParentSubblock) -> State:
        """The parent's weights; each KV head is the mean of those that become one (paper appendix A).

        Of query heads those are kept without which most is lost (`rank_blocks`), with the KV heads that they read, and
        the output projection is updated for them by least squares; with the paper's starts its columns stay.
        """
        own, config, state = parent.variant, parent.config, dict(parent.state)
        assert isinstance(own, GroupedQuery)
        kv_heads, (heads, of_parent) = self.num_key_value_heads, (self._heads(config), own._heads(config))
        if heads == of_parent:

            def means(units: Tensor) -> Tensor:
                return units.unflatten(1, (kv_heads, -1)).double().mean(2).to(units.dtype)

            return state | {name: axis.mapped(state[name], means) for name, axis in own._axes(config).items()}
        name = f"{self.output_projection(config)}.weight"
        weight_DI, moment_II = state[name].double(), parent.statistics["activation_second_moment"].double()
        whole = kv_heads < own.num_key_value_heads
        groups, blocks = (1, own.num_key_value_heads) if whole else (kv_heads, of_parent // kv_heads)
        ranked = rank_blocks(weight_DI, moment_II, groups, blocks)
        kept = ranked[:, : blocks * heads // of_parent].sort(1).values

        def of_blocks(units: int) -> Tensor:
            """The units, of all that there are, that are in blocks that are kept."""
            by_block = torch.arange(units, device=kept.device).view(groups, blocks, -1)
            return by_block.gather(1, kept.unsqueeze(-1).expand(-1, -1, by_block.shape[2])).flatten()

        parts = own._axes(config).items() if whole else ()
        for tensor, axis in (*parts, *own._query_axes(config).items()):
            state[tensor] = axis.mapped(state[tensor], lambda units: units[:, of_blocks(units.shape[1])])
        if parent.settings.start == "closed_form":
            updated = least_squares_update(weight_DI, moment_II, of_blocks(weight_DI.shape[1]))
            state[name] = updated.to(state[name].dtype)
        return state

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        """KV heads are repeated; or query heads, with their KV heads, are added whose output is multiplied by zeros."""
        if not isinstance(wider, GroupedQuery) or (wider.window, wider.sinks) != (self.window, self.sinks):
            return None
        heads, wanted, kv_heads = self._heads(config), wider._heads(config), self.num_key_value_heads
        groups, rest = divmod(wider.num_key_value_heads, kv_heads)
        added, per_group = wider.num_key_value_heads - kv_heads, wanted // wider.num_key_value_heads - heads // kv_heads
        if (rest or not groups) if heads == wanted else min(wanted - heads, added, per_group) < 0:
            return None

        def widened(units: Tensor, missing: int) -> Tensor:
            if heads == wanted:
                return units.repeat_interleave(groups, 1)
            by_group = units.unflatten(1, (kv_heads, -1))
            return pad(by_group, (0, 0) * (units.ndim - 2) + (0, missing, 0, added)).flatten(1, 2)

        queries = self._query_axes(config) if heads < wanted else {}
        for axes_of, missing in ((self._axes(config), 0), (queries, per_group)):
            for name, axis in axes_of.items():
                state = state | {name: axis.mapped(state[name], partial(widened, missing=missing))}
        return state

    def linear_map(self, state: State, config: PuzzleConfig) -> tuple[Tensor, Tensor | None] | None:
        """W_o W_v: each token attends to itself alone; the V heads are repeated for the query heads that read them."""
        *_, value = (name for name in self._axes(config) if name.endswith("_proj.weight"))
        output = state["self_attn.o_proj.weight"].double()
        rows = output.shape[1] * self.num_key_value_heads // self._heads(config)  # of V, the last of a joint matrix

        def repeated(tensor: Tensor) -> Tensor:
            heads = tensor[-rows:].double().unflatten(0, (self.num_key_value_heads, -1))
            return heads.repeat_interleave(self._heads(config) // self.num_key_value_heads, 0).flatten(0, 1)

        weight, bias = output @ repeated(state[value]), state.get("self_attn.o_proj.bias")
        if (value_bias := state.get(value.replace(".weight", ".bias"))) is not None:
            through = output @ repeated(value_bias)
            bias = through if bias is None else through + bias.double()
        return weight, bias

    def _axes(self, config: PuzzleConfig) -> dict[str, Axis]:
        """Tensors that have a part for each KV head."""
        count = self.num_key_value_heads
        return axes(self, replace(self, num_key_value_heads=2 * count), config, count, config.head_dim or 1)

    def _query_axes(self, config: PuzzleConfig) -> dict[str, Axis]:
        """Tensors that have a part for each query head; none where the output projection has not, where heads are
        normed together, and in latent attention.
        """
        heads = self._heads(config)
        doubled = replace(self, num_attention_heads=2 * heads)
        found = axes(self, doubled, config, heads, config.head_dim or 1, first=True)
        apart = f"{self.output_projection(config)}.weight" in found and not any("norm" in name for name in found)
        return found if apart and self._axes(config) else {}

    def _heads(self, config: PuzzleConfig) -> int:
        """Of queries: the model's configuration says nothing of them where layers differ."""
        return self.num_attention_heads or int(family_config(config).num_attention_heads)

    def _held(self, tokens: int, more: int = 0) -> int:
        """Number of tokens whose keys and values are cached after `tokens`."""
        return tokens if self.window is None else min(tokens, self.sinks + self.window - 1 + more)

    def _reach(self, config: PuzzleConfig) -> int:
        """Largest number of tokens that a token attends to."""
        limit: int = config.max_position_embeddings
        return limit if self.window is None else min(limit, self.window + self.sinks)
