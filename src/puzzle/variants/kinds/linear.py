"""Linear maps: instead of attention (each token attends to itself alone) or of the FFN (paper section 2.1).

Of low rank: two maps through a few channels, with nothing between them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant
from puzzle.variants.least_squares import linear_loss, reduced_rank, ridge
from puzzle.variants.registry import register


class PuzzleLinearMixer(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class PuzzleLinearMLP(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


class PuzzleLowRankMLP(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.reduce_proj = nn.Linear(config.hidden_size, entry["rank"], bias=False)
        self.expand_proj = nn.Linear(entry["rank"], config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.expand_proj(self.reduce_proj(hidden_states))


@dataclass(frozen=True)
class _Linear(Variant):
    kind = "linear"
    grammar = "linear"
    closed_form = True
    description = "linear map"
    linear: ClassVar[str]
    """The linear module, by its name in the layer."""

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return not parent.closed_form

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"replace_with_linear": True}

    def initialise(self, parent: ParentSubblock) -> State:
        """The ridge regression of the subblock's output on its normed input.

        With the paper's starts: the linear map that the parent's weights make.
        """
        if parent.variant == self:
            return dict(parent.state)
        made = parent.variant.linear_map(parent.state) if parent.start.method == "paper" else None
        weight, bias = made or ridge(parent.statistics, bias=f"{self.linear}.bias" in self.shapes(parent.config))
        state = {f"{self.linear}.weight": weight} | ({} if bias is None else {f"{self.linear}.bias": bias})
        return parent.norm | {name: tensor.to(parent.dtype).contiguous() for name, tensor in state.items()}

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return linear_loss(parent.statistics, state[f"{self.linear}.weight"], state.get(f"{self.linear}.bias"))


@register
@dataclass(frozen=True)
class LinearAttention(_Linear):
    subblock = "attention"
    module = PuzzleLinearMixer
    linear = "self_attn.linear_attn"
    cell = "linear attention"


@register
@dataclass(frozen=True)
class LinearFFN(_Linear):
    subblock = "ffn"
    module = PuzzleLinearMLP
    linear = "mlp.linear_mlp"
    cell = "linear FFN"


@register
@dataclass(frozen=True)
class LowRankFFN(Variant):
    subblock = "ffn"
    kind = "low_rank"
    grammar = "rank{rank}"
    module = PuzzleLowRankMLP
    closed_form = True
    output_projection = "mlp.expand_proj"
    cell = "low-rank FFN"
    rank: int

    @property
    def description(self) -> str:
        return f"linear map of rank {self.rank}"

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        """Smaller than the parent's FFN, and than one linear map."""
        return 2 * self.rank < config.hidden_size and self.num_params(config) < parent.num_params(config)

    def initialise(self, parent: ParentSubblock) -> State:
        """The reduced-rank regression from the normed input to the subblock's output.

        With the paper's starts: the linear map that the parent's weights make, cut to this rank.
        """
        if parent.variant == self:
            return dict(parent.state)
        linear = parent.variant.linear_map(parent.state) if parent.start.method == "paper" else None
        if linear is not None:
            weight_DD, bias_D = linear
            expand_DR = torch.linalg.svd(weight_DD).U[:, : self.rank]
            reduce_RD = expand_DR.T @ weight_DD
        else:
            bias = "mlp.expand_proj.bias" in self.shapes(parent.config)
            expand_DR, reduce_RD, bias_D = reduced_rank(parent.statistics, self.rank, bias=bias)
        state = {"mlp.reduce_proj.weight": reduce_RD, "mlp.expand_proj.weight": expand_DR}
        if bias_D is not None:
            state["mlp.expand_proj.bias"] = bias_D
        return parent.norm | {name: tensor.to(parent.dtype).contiguous() for name, tensor in state.items()}

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        weight_DD = state["mlp.expand_proj.weight"].double() @ state["mlp.reduce_proj.weight"].double()
        return linear_loss(parent.statistics, weight_DD, state.get("mlp.expand_proj.bias"))

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, LowRankFFN) or wider.rank < self.rank:
            return None
        missing = wider.rank - self.rank
        return state | {
            "mlp.reduce_proj.weight": pad(state["mlp.reduce_proj.weight"], (0, 0, 0, missing)),
            "mlp.expand_proj.weight": pad(state["mlp.expand_proj.weight"], (0, missing)),
        }
