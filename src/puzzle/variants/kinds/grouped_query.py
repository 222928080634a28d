"""Grouped-query attention: the parent variant, fewer KV heads, sliding windows (paper appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer
from puzzle.variants.base import ParentSubblock, State, Variant, add_sum
from puzzle.variants.registry import register


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
    grammar = "kv{num_key_value_heads}[win{window}[s{sinks}]]"
    output_projection = "self_attn.o_proj"
    recorded = "self_attn.o_proj"
    setting = "kv_heads"
    num_key_value_heads: int
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.num_key_value_heads < 1 or (self.sinks if self.window is None else self.window < 2):
            raise ValueError("KV heads are at least 1, a window has at least 2 tokens, and only a window has sinks")

    @property
    def description(self) -> str:
        heads = f"{self.num_key_value_heads} KV head{'s' if self.num_key_value_heads > 1 else ''}"
        window = "" if self.window is None else f", window {self.window}"
        return heads + window + (f", first {self.sinks} kept" if self.sinks else "")

    def kv_values(self, config: PuzzleConfig, tokens: int) -> int:
        """A window caches one token less than it has: the last one is the next token itself."""
        assert config.head_dim is not None
        return 2 * self.num_key_value_heads * config.head_dim * self._held(tokens)

    def operations(self, config: PuzzleConfig, new: int, context: int) -> float:
        """Matrices, and each query with the keys that it sees, which are multiplied twice."""
        assert config.head_dim is not None
        first, seen = context - new + 1, self._held(context)
        growing = max(0, min(context, seen) - first + 1)  # queries that see every token before them
        pairs = growing * (2 * first + growing - 1) / 2 + (new - growing) * seen
        return super().operations(config, new, context) + 4.0 * pairs * config.num_attention_heads * config.head_dim

    def activation_values(self, config: PuzzleConfig) -> int:
        """Queries, keys, values and the heads' outputs."""
        assert config.head_dim is not None
        return 2 * config.head_dim * (config.num_attention_heads + self.num_key_value_heads)

    def problem(self, config: PuzzleConfig) -> str | None:
        heads = config.num_attention_heads
        wrong = f"{self}, which does not divide the parent's {heads} attention heads; use a divisor"
        return wrong if heads % self.num_key_value_heads else None

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

    def share(self, parent: Variant) -> float | None:
        """A window is told by the text beside it."""
        return self.num_key_value_heads / parent.num_key_value_heads if isinstance(parent, GroupedQuery) else None

    @property
    def cell(self) -> str:
        if self.window is None:
            return "fewer KV heads"
        return "window with sinks" if self.sinks else "window"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        heads = config.num_attention_heads // self.num_key_value_heads
        return {"n_heads_in_group": heads} if self.window is None else None

    def initialise(self, parent: ParentSubblock) -> State:
        """The parent's weights, with its KV heads merged or selected if there are fewer (paper appendix A).

        With `kv_heads="mean"` each is the mean of the heads that become one (Ainslie et al. 2023); with "importance"
        the heads whose groups add most to the output stay as they are.
        """
        assert isinstance(parent.variant, GroupedQuery)
        parent_heads = parent.variant.num_key_value_heads
        state = dict(parent.state)
        if parent_heads == self.num_key_value_heads:
            return state
        if parent.start.kv_heads == "importance":
            ranking = parent.statistics["group_contribution"].argsort(descending=True, stable=True)
            kept = ranking[: self.num_key_value_heads].sort().values
            return keep_groups(state, parent_heads, kept, parent.config)
        merged = {name: merge_heads(state[name], parent_heads, self.num_key_value_heads) for name in _kv_tensors(state)}
        return state | merged

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return 0.0 if parent.variant == self else None

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GroupedQuery) or wider.num_key_value_heads % self.num_key_value_heads:
            return None
        if (wider.window, wider.sinks) != (self.window, self.sinks):
            return None
        repeats = wider.num_key_value_heads // self.num_key_value_heads
        kv = _kv_tensors(state)
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

    def record(self, sums: State, layer: PuzzleDecoderLayer, *inputs: Tensor) -> None:
        """`group_contribution` [KV heads]: the norm of what each group's query heads add through their columns."""
        heads_NH, weight_DH = inputs[0].float().flatten(0, -2), layer.get_parameter("self_attn.o_proj.weight").float()
        groups = self.num_key_value_heads
        parts = zip(heads_NH.chunk(groups, dim=1), weight_DH.chunk(groups, dim=1), strict=True)
        norms = torch.stack([(heads @ weight.T).norm(dim=1).sum() for heads, weight in parts])
        add_sum(sums, "group_contribution", norms)

    def _held(self, tokens: int) -> int:
        """Number of tokens whose keys and values are cached after `tokens`."""
        return tokens if self.window is None else min(tokens, self.sinks + self.window - 1)

    def _reach(self, config: PuzzleConfig) -> int:
        """Largest number of tokens that a token attends to."""
        limit: int = config.max_position_embeddings
        return limit if self.window is None else min(limit, self.window + self.sinks)


def merge_heads(tensor: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """[old_heads * head_dim, ...] -> [new_heads * head_dim, ...], each new head the mean of its group of old ones."""
    grouped = tensor.unflatten(0, (new_heads, old_heads // new_heads, -1))
    return grouped.double().mean(1).flatten(0, 1).to(tensor.dtype)


def keep_groups(state: State, old_heads: int, kept: Tensor, config: PuzzleConfig) -> State:
    """The attention with only these KV heads, each with its query heads first, then some of the removed groups'.

    The output projection's columns of these spare query heads are zero, so they add nothing before training.

    Args:
        old_heads: present number of KV heads.
        kept: indices of the kept KV heads, ascending, [new_heads].
    """
    queries = torch.arange(config.num_attention_heads, device=kept.device).view(old_heads, -1)
    gone = torch.ones(old_heads, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    order = torch.cat([queries[kept], queries[gone].view(len(kept), -1)], dim=1)
    result = {name: _heads(state[name], old_heads)[kept].flatten(0, 1) for name in _kv_tensors(state)}
    for name in (name for name in state if name.split(".")[1] == "q_proj"):
        result[name] = _heads(state[name], order.numel())[order.flatten()].flatten(0, 1)
    columns = state["self_attn.o_proj.weight"].unflatten(1, (order.numel(), -1))[:, order.flatten()]
    columns.unflatten(1, order.shape)[:, :, queries.shape[1] :] = 0
    return state | result | {"self_attn.o_proj.weight": columns.flatten(1, 2)}


def _kv_tensors(state: State) -> set[str]:
    return {name for name in state if name.split(".")[1] in ("k_proj", "v_proj")}


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, ...] -> [heads, head_dim, ...]."""
    return tensor.unflatten(0, (heads, -1))


def _repeated(tensor: Tensor, heads: int, repeats: int) -> Tensor:
    """[heads * head_dim, ...] -> [heads * repeats * head_dim, ...], each head repeated `repeats` times in a row."""
    return _heads(tensor, heads).repeat_interleave(repeats, 0).flatten(0, 1)
