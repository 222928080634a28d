"""FFN variants (paper section 2.1 and appendix A)."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import Nothing, ParentSubblock, State, Subblock, Unsized, Variant
from puzzle.variants.linear import linear_loss, linear_start, output_power, reduced_rank, refit
from puzzle.variants.modules import num_params

_NORM = "post_attention_layernorm."


@dataclass(frozen=True)
class GatedFFN(Variant):
    """The family's gated FFN with `intermediate_size` channels; with the parent's number, the parent's own FFN."""

    subblock: ClassVar[Subblock] = "ffn"
    kind: ClassVar[str] = "gated"
    closed_form: ClassVar[bool] = False
    output_projection: ClassVar[str | None] = "mlp.down_proj"
    intermediate_size: int

    @property
    def name(self) -> str:
        return f"w{self.intermediate_size}"

    def module_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "intermediate_size": self.intermediate_size}

    @classmethod
    def form(cls) -> str:
        return "w<number>"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"w([1-9][0-9]*)", name)
        return cls(int(match[1])) if match else None

    @classmethod
    def from_config(cls, entry: dict[str, Any]) -> Self:
        return cls(entry["intermediate_size"])

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return isinstance(own, GatedFFN) and self.intermediate_size < own.intermediate_size

    def initialise(self, parent: ParentSubblock) -> State:
        """Keep the first channels of the ranking (`puzzle.variants.channels`); refit the down projection to them.

        The refit is the least-squares optimum of the BLD loss for the kept channels; a bias stays the parent's. The
        start of the paper keeps the down projection's own columns.
        """
        assert isinstance(parent.variant, GatedFFN)
        state = dict(parent.state)
        if parent.variant == self:
            return state
        kept = self._kept(parent)
        for name, tensor in state.items():
            if name.split(".")[1] in ("gate_proj", "up_proj"):
                state[name] = tensor[kept].clone()
        down = state["mlp.down_proj.weight"]
        if parent.start.method == "paper":
            state["mlp.down_proj.weight"] = down[:, kept].clone()
        else:
            refitted = refit(down.double(), parent.statistics["activation_second_moment"].double(), kept)
            state["mlp.down_proj.weight"] = refitted.to(down.dtype)
        return state

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        """tr((W - W') C (W - W')^T) / E||y||^2 with W' zero where a channel is gone.

        Only of weights as they start: gate and up projection are taken to be the parent's own.
        """
        if parent.variant == self:
            return 0.0
        left_DI = parent.state["mlp.down_proj.weight"].to(torch.float64, copy=True)
        left_DI[:, self._kept(parent)] -= state["mlp.down_proj.weight"].double()
        moment_II = parent.statistics["activation_second_moment"].double()
        return float((left_DI @ moment_II * left_DI).sum() / output_power(parent.statistics))

    @property
    def cell(self) -> str:
        return "narrower FFN"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"intermediate_size": self.intermediate_size}

    def _kept(self, parent: ParentSubblock) -> Tensor:
        """The parent's channels that it has, in their order. [I']"""
        assert isinstance(parent.variant, GatedFFN)
        assert self.intermediate_size <= parent.variant.intermediate_size
        return parent.channels[: self.intermediate_size].sort().values

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
class LowRankFFN(Variant):
    """Two linear maps through `rank` channels instead of the FFN."""

    subblock: ClassVar[Subblock] = "ffn"
    kind: ClassVar[str] = "low_rank"
    closed_form: ClassVar[bool] = True
    output_projection: ClassVar[str | None] = "mlp.expand_proj"
    rank: int

    @property
    def name(self) -> str:
        return f"rank{self.rank}"

    def module_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "rank": self.rank}

    @classmethod
    def form(cls) -> str:
        return "rank<number>"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"rank([1-9][0-9]*)", name)
        return cls(int(match[1])) if match else None

    @classmethod
    def from_config(cls, entry: dict[str, Any]) -> Self:
        return cls(entry["rank"])

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        """Smaller than the layer's own FFN, and than one linear map."""
        return 2 * self.rank < config.hidden_size and num_params(self, config) < num_params(own, config)

    def initialise(self, parent: ParentSubblock) -> State:
        """The reduced-rank regression from the normed input to the contribution.

        With the paper's starts, from weights alone: `LinearFFN`'s map of the gated FFN, cut to this rank.
        """
        if parent.variant == self:
            return dict(parent.state)
        if parent.start.method == "paper" and isinstance(parent.variant, GatedFFN):
            weight_DD, bias_D = _without_gate(parent.state)
            expand_DR = torch.linalg.svd(weight_DD).U[:, : self.rank]
            reduce_RD = expand_DR.T @ weight_DD
        else:
            expand_DR, reduce_RD, bias_D = reduced_rank(parent.statistics, self.rank, bias=parent.config.mlp_bias)
        state = {"mlp.reduce_proj.weight": reduce_RD, "mlp.expand_proj.weight": expand_DR}
        if bias_D is not None:
            state["mlp.expand_proj.bias"] = bias_D
        return _with_norm(parent, state)

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        weight_DD = state["mlp.expand_proj.weight"].double() @ state["mlp.reduce_proj.weight"].double()
        return linear_loss(parent.statistics, weight_DD, state.get("mlp.expand_proj.bias"))

    @property
    def cell(self) -> str:
        return "low-rank FFN"

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, LowRankFFN) or wider.rank < self.rank:
            return None
        missing = wider.rank - self.rank
        return state | {
            "mlp.reduce_proj.weight": _pad(state["mlp.reduce_proj.weight"], dim=0, count=missing),
            "mlp.expand_proj.weight": _pad(state["mlp.expand_proj.weight"], dim=1, count=missing),
        }


@dataclass(frozen=True)
class LinearFFN(Unsized):
    """One linear map instead of the FFN."""

    subblock: ClassVar[Subblock] = "ffn"
    kind: ClassVar[str] = "linear"
    closed_form: ClassVar[bool] = True

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return own not in (self, NoFFN()) and not isinstance(own, LowRankFFN)

    def initialise(self, parent: ParentSubblock) -> State:
        """The ridge regression from the normed input to the contribution; of a gated FFN, the paper's W_down W_up."""
        if parent.variant == self:
            return dict(parent.state)
        if parent.start.method == "paper" and isinstance(parent.variant, GatedFFN):
            weight_DD, bias_D = _without_gate(parent.state)
            state = {"mlp.linear_mlp.weight": weight_DD}
            return _with_norm(parent, state if bias_D is None else state | {"mlp.linear_mlp.bias": bias_D})
        return linear_start(parent, _NORM, "mlp.linear_mlp", bias=parent.config.mlp_bias)

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return linear_loss(parent.statistics, state["mlp.linear_mlp.weight"], state.get("mlp.linear_mlp.bias"))

    @property
    def cell(self) -> str:
        return "linear FFN"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"replace_with_linear": True}


@dataclass(frozen=True)
class NoFFN(Nothing):
    """Nothing: no parameters, no norm."""

    subblock: ClassVar[Subblock] = "ffn"

    @property
    def cell(self) -> str:
        return "no FFN"


def _without_gate(state: State) -> tuple[Tensor, Tensor | None]:
    """A gated FFN as one linear map that ignores its gate, W_down W_up and its bias, in float64 (paper appendix A)."""
    down_DI, up_ID = state["mlp.down_proj.weight"].double(), state["mlp.up_proj.weight"].double()
    if "mlp.up_proj.bias" not in state:
        return down_DI @ up_ID, None
    return down_DI @ up_ID, down_DI @ state["mlp.up_proj.bias"].double() + state["mlp.down_proj.bias"].double()


def _with_norm(parent: ParentSubblock, state: State) -> State:
    """The parent's own norm and these tensors in its dtype."""
    norm = {name: tensor for name, tensor in parent.state.items() if name.startswith(_NORM)}
    dtype = next(iter(parent.state.values())).dtype
    return norm | {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def _pad(tensor: Tensor, *, dim: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
