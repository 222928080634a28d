"""Attention variants (paper section 2.1 and appendix A)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from puzzle.blocks.linear import linear_start
from puzzle.blocks.variants import Half, ParentSubblock, State, Unsized, Variant
from puzzle.modeling import PuzzleConfig


@dataclass(frozen=True)
class GroupedQuery(Variant):
    """Grouped-query attention with `num_kv_heads` KV heads; with the parent's number, the parent's own attention."""

    half: ClassVar[Half] = "attention"
    kind: ClassVar[str] = "gqa"
    trained: ClassVar[bool] = True
    num_kv_heads: int

    @property
    def name(self) -> str:
        return f"kv{self.num_kv_heads}"

    def module_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_key_value_heads": self.num_kv_heads}

    def initialise(self, parent: ParentSubblock) -> State:
        """Mean of the K and V projections of the heads that become one (Ainslie et al. 2023, paper appendix A)."""
        assert isinstance(parent.variant, GroupedQuery)
        assert parent.variant.num_kv_heads % self.num_kv_heads == 0
        state = dict(parent.state)
        if parent.variant == self:
            return state
        for name in _kv_tensors(state):
            state[name] = merge_heads(state[name], parent.variant.num_kv_heads, self.num_kv_heads)
        return state

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GroupedQuery) or wider.num_kv_heads % self.num_kv_heads:
            return None
        repeats = wider.num_kv_heads // self.num_kv_heads
        kv = _kv_tensors(state)
        return {
            name: tensor.unflatten(0, (self.num_kv_heads, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
            if name in kv
            else tensor
            for name, tensor in state.items()
        }


@dataclass(frozen=True)
class LinearAttention(Unsized):
    """One linear map instead of attention, the ridge regression from the normed input to the contribution."""

    half: ClassVar[Half] = "attention"
    kind: ClassVar[str] = "linear"
    trained: ClassVar[bool] = False

    def initialise(self, parent: ParentSubblock) -> State:
        if parent.variant == self:
            return dict(parent.state)
        return linear_start(parent, "input_layernorm.", "self_attn.linear_attn", bias=parent.config.attention_bias)


@dataclass(frozen=True)
class NoAttention(Unsized):
    """Nothing: no parameters, no norm, no KV cache."""

    half: ClassVar[Half] = "attention"
    kind: ClassVar[str] = "none"
    trained: ClassVar[bool] = False

    def initialise(self, parent: ParentSubblock) -> State:
        return {}


def _kv_tensors(state: State) -> set[str]:
    return {name for name in state if name.split(".")[1] in ("k_proj", "v_proj")}


def merge_heads(tensor: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """[old_heads * head_dim, ...] -> [new_heads * head_dim, ...], each new head the mean of its group of old ones."""
    grouped = tensor.unflatten(0, (new_heads, old_heads // new_heads, -1))
    return grouped.double().mean(1).flatten(0, 1).to(tensor.dtype)
