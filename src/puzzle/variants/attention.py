"""Attention variants (paper section 2.1 and appendix A)."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import Nothing, ParentSubblock, State, Subblock, Unsized, Variant
from puzzle.variants.linear import linear_loss, linear_start

_NORM = "input_layernorm."
_LINEAR = "self_attn.linear_attn"


@dataclass(frozen=True)
class GroupedQuery(Variant):
    """Grouped-query attention with `num_kv_heads` KV heads; with the parent's sizes, the parent's own attention.

    Attributes:
        window: how many of the most recent tokens a token attends to, itself included, at least 2; None: to all.
        sinks: how many of the sequence's first tokens it attends to besides (Xiao et al. 2024).
    """

    subblock: ClassVar[Subblock] = "attention"
    kind: ClassVar[str] = "gqa"
    closed_form: ClassVar[bool] = False
    output_projection: ClassVar[str | None] = "self_attn.o_proj"
    num_kv_heads: int
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        assert self.sinks == 0 if self.window is None else self.window > 1

    @property
    def name(self) -> str:
        window = "" if self.window is None else f"win{self.window}"
        return f"kv{self.num_kv_heads}{window}" + (f"s{self.sinks}" if self.sinks else "")

    def module_config(self) -> dict[str, Any]:
        window = {} if self.window is None else {"window": self.window, "sinks": self.sinks}
        return {"kind": self.kind, "num_key_value_heads": self.num_kv_heads} | window

    @classmethod
    def form(cls) -> str:
        return "kv<number>, kv<number>win<number>, kv<number>win<number>s<number>"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"kv([1-9][0-9]*)(?:win([2-9]|[1-9][0-9]+)(?:s([1-9][0-9]*))?)?", name)
        if match is None:
            return None
        heads, window, sinks = match.groups()
        return cls(int(heads), int(window) if window else None, int(sinks or 0))

    @classmethod
    def from_config(cls, entry: dict[str, Any]) -> Self:
        return cls(entry["num_key_value_heads"], entry.get("window"), entry.get("sinks", 0))

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        """Fewer KV heads, which divide the layer's own, a shorter reach, or both."""
        if not isinstance(own, GroupedQuery) or own.num_kv_heads % self.num_kv_heads:
            return False
        if (self.window, self.sinks) == (own.window, own.sinks):
            return self.num_kv_heads < own.num_kv_heads
        return self._reach(config) < own._reach(config)

    def kv_values(self, config: PuzzleConfig, tokens: int) -> int:
        """Keys and values cached of a sequence of `tokens`; of a window all but one, which is the next token's own."""
        assert config.head_dim is not None
        held = tokens if self.window is None else min(tokens, self.sinks + self.window - 1)
        return 2 * self.num_kv_heads * config.head_dim * held

    def initialise(self, parent: ParentSubblock) -> State:
        """The parent's weights, with its KV heads merged or selected if there are fewer (paper appendix A).

        With `kv_heads="mean"` each is the mean of the heads that become one (Ainslie et al. 2023); with "importance"
        the heads whose groups contribute most stay as they are.
        """
        assert isinstance(parent.variant, GroupedQuery)
        own_heads = parent.variant.num_kv_heads
        assert own_heads % self.num_kv_heads == 0
        state = dict(parent.state)
        if own_heads == self.num_kv_heads:
            return state
        if parent.start.kv_heads == "importance":
            kept = parent.statistics["group_contribution"].argsort(descending=True, stable=True)[: self.num_kv_heads]
            return keep_groups(state, own_heads, kept.sort().values, parent.config)
        for name in _kv_tensors(state):
            state[name] = merge_heads(state[name], own_heads, self.num_kv_heads)
        return state

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return 0.0 if parent.variant == self else None

    @property
    def cell(self) -> str:
        if self.window is None:
            return "fewer KV heads"
        return "window with sinks" if self.sinks else "window"

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        if self.window is not None:
            return None
        return {"n_heads_in_group": config.num_attention_heads // self.num_kv_heads}

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GroupedQuery) or wider.num_kv_heads % self.num_kv_heads:
            return None
        if (wider.window, wider.sinks) != (self.window, self.sinks):
            return None
        repeats = wider.num_kv_heads // self.num_kv_heads
        kv = _kv_tensors(state)
        return {
            name: _heads(tensor, self.num_kv_heads).repeat_interleave(repeats, 0).flatten(0, 1)
            if name in kv
            else tensor
            for name, tensor in state.items()
        }

    def _reach(self, config: PuzzleConfig) -> int:
        """How many tokens can be attended to at most."""
        limit: int = config.max_position_embeddings
        return limit if self.window is None else min(limit, self.window + self.sinks)


@dataclass(frozen=True)
class LinearAttention(Unsized):
    """One linear map instead of attention: each token attends to itself alone."""

    subblock: ClassVar[Subblock] = "attention"
    kind: ClassVar[str] = "linear"
    closed_form: ClassVar[bool] = True

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return own not in (self, NoAttention())

    def initialise(self, parent: ParentSubblock) -> State:
        """The ridge regression from the normed input to the contribution; of grouped queries, the paper's W_o W_v."""
        if parent.variant == self:
            return dict(parent.state)
        if parent.start.method == "paper" and isinstance(parent.variant, GroupedQuery):
            return _attend_to_itself(parent, parent.variant.num_kv_heads)
        return linear_start(parent, _NORM, _LINEAR, bias=parent.config.attention_bias)

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return linear_loss(parent.statistics, state[f"{_LINEAR}.weight"], state.get(f"{_LINEAR}.bias"))

    @property
    def cell(self) -> str:
        return "linear attention"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"replace_with_linear": True}


@dataclass(frozen=True)
class NoAttention(Nothing):
    """No KV cache either."""

    subblock: ClassVar[Subblock] = "attention"

    @property
    def cell(self) -> str:
        return "no attention"


def _kv_tensors(state: State) -> set[str]:
    return {name for name in state if name.split(".")[1] in ("k_proj", "v_proj")}


def merge_heads(tensor: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """[old_heads * head_dim, ...] -> [new_heads * head_dim, ...], each new head the mean of its group of old ones."""
    grouped = tensor.unflatten(0, (new_heads, old_heads // new_heads, -1))
    return grouped.double().mean(1).flatten(0, 1).to(tensor.dtype)


def keep_groups(state: State, old_heads: int, kept: Tensor, config: PuzzleConfig) -> State:
    """The attention with only these KV heads, each leading its own query heads and spare ones of the groups that go.

    The spare heads' columns of the output projection are zero: they add nothing until training lets them.

    Args:
        old_heads: number of KV heads so far.
        kept: indices of those that stay, ascending, [new_heads].
    """
    queries = torch.arange(config.num_attention_heads, device=kept.device).view(old_heads, -1)
    gone = torch.ones(old_heads, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    spare = queries[gone].view(len(kept), -1)
    order = torch.cat([queries[kept], spare], dim=1).flatten()
    silent = torch.cat([torch.zeros_like(queries[kept]), torch.ones_like(spare)], dim=1).flatten().bool()
    result = dict(state)
    for name in _kv_tensors(state):
        result[name] = _heads(state[name], old_heads)[kept].flatten(0, 1)
    for name in (name for name in state if name.split(".")[1] == "q_proj"):
        result[name] = _heads(state[name], len(order))[order].flatten(0, 1)
    columns = state["self_attn.o_proj.weight"].unflatten(1, (len(order), -1))[:, order]
    columns[:, silent] = 0
    result["self_attn.o_proj.weight"] = columns.flatten(1, 2)
    return result


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, ...] -> [heads, head_dim, ...]."""
    return tensor.unflatten(0, (heads, -1))


def _attend_to_itself(parent: ParentSubblock, kv_heads: int) -> State:
    """W_o W_v, the V heads repeated for the query heads that read them, and what the biases add (paper appendix A)."""
    repeats = parent.config.num_attention_heads // kv_heads
    output = parent.state["self_attn.o_proj.weight"].double()

    def through(value: Tensor) -> Tensor:
        return output @ _heads(value.double(), kv_heads).repeat_interleave(repeats, 0).flatten(0, 1)

    state = {name: tensor for name, tensor in parent.state.items() if name.startswith(_NORM)}
    weight = parent.state["self_attn.v_proj.weight"]
    state[f"{_LINEAR}.weight"] = through(weight).to(weight.dtype)
    if parent.config.attention_bias:
        offset = through(parent.state["self_attn.v_proj.bias"]) + parent.state["self_attn.o_proj.bias"].double()
        state[f"{_LINEAR}.bias"] = offset.to(weight.dtype)
    return state
