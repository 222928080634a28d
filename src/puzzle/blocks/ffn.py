"""FFN variants (paper section 2.1 and appendix A)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from puzzle.blocks.linear import linear_start, refit
from puzzle.blocks.variants import Half, ParentSubblock, State, Unsized, Variant
from puzzle.modeling import PuzzleConfig


@dataclass(frozen=True)
class GatedFFN(Variant):
    """The family's gated FFN with `intermediate_size` channels; with the parent's number, the parent's own FFN."""

    half: ClassVar[Half] = "ffn"
    kind: ClassVar[str] = "gated"
    trained: ClassVar[bool] = True
    intermediate_size: int

    @property
    def name(self) -> str:
        return f"w{self.intermediate_size}"

    def module_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "intermediate_size": self.intermediate_size}

    def initialise(self, parent: ParentSubblock) -> State:
        """Keep the channels that contribute most, then refit the down projection to what is left.

        The contribution of a channel is mean|a_i| * ||W_down[:, i]|| (paper appendix A). The refit is the least-squares
        optimum of the BLD loss for the kept channels; a bias stays the parent's.
        """
        assert isinstance(parent.variant, GatedFFN)
        assert self.intermediate_size <= parent.variant.intermediate_size
        state = dict(parent.state)
        if parent.variant == self:
            return state
        kept = channel_ranking(parent)[: self.intermediate_size].sort().values
        for name, tensor in state.items():
            if name.split(".")[1] in ("gate_proj", "up_proj"):
                state[name] = tensor[kept].clone()
        down = state["mlp.down_proj.weight"]
        refitted = refit(down.double(), parent.statistics["activation_second_moment"].double(), kept)
        state["mlp.down_proj.weight"] = refitted.to(down.dtype)
        return state

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GatedFFN) or wider.intermediate_size < self.intermediate_size:
            return None
        missing = wider.intermediate_size - self.intermediate_size
        widened = dict(state)
        for name, tensor in state.items():
            if name.split(".")[1] in ("gate_proj", "up_proj"):
                widened[name] = _pad(tensor, dim=0, count=missing)
            elif name == "mlp.down_proj.weight":
                widened[name] = _pad(tensor, dim=1, count=missing)
        return widened


@dataclass(frozen=True)
class LinearFFN(Unsized):
    """One linear map instead of the FFN, the ridge regression from the normed input to the contribution."""

    half: ClassVar[Half] = "ffn"
    kind: ClassVar[str] = "linear"
    trained: ClassVar[bool] = False

    def initialise(self, parent: ParentSubblock) -> State:
        if parent.variant == self:
            return dict(parent.state)
        return linear_start(parent, "post_attention_layernorm.", "mlp.linear_mlp", bias=parent.config.mlp_bias)


@dataclass(frozen=True)
class NoFFN(Unsized):
    """Nothing: no parameters, no norm."""

    half: ClassVar[Half] = "ffn"
    kind: ClassVar[str] = "none"
    trained: ClassVar[bool] = False

    def initialise(self, parent: ParentSubblock) -> State:
        return {}


def channel_ranking(parent: ParentSubblock) -> Tensor:
    """Channel indices, the one that contributes most first; one ranking gives nested widths. [intermediate_size]"""
    down = parent.state["mlp.down_proj.weight"].float()
    contribution = parent.statistics["activation_mean_abs"].float() * down.norm(dim=0)
    return contribution.argsort(descending=True, stable=True)


def _pad(tensor: Tensor, *, dim: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
