"""Linear maps instead of attention (each token attends to itself alone) or of the FFN (paper section 2.1); of low rank,
two maps through a few channels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant, register
from puzzle.variants.least_squares import ridge


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
    factors: ClassVar[tuple[str, ...]]
    """The linear modules whose product is the map, by their names in the layer; the first may have a bias."""

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return not parent.closed_form

    def deci(self, config: PuzzleConfig) -> dict[str, Any] | None:
        return {"replace_with_linear": True} if self.size is None else None

    def initialise(self, parent: ParentSubblock) -> State:
        """The regression of this rank; with the paper's starts, the parent's own linear map cut to this rank."""
        if parent.variant == self:
            return dict(parent.state)
        paper = parent.settings.start == "paper"
        if paper and (made := parent.variant.linear_map(parent.state, parent.config)):
            weight_DD, bias_D = made
            expand_DR = None if self.size is None else torch.linalg.svd(weight_DD).U[:, : self.size]
            matrices = [weight_DD] if expand_DR is None else [expand_DR, expand_DR.T @ weight_DD]
        else:
            has_bias = f"{self.factors[0]}.bias" in self.shapes(parent.config)
            matrices, bias_D = ridge(parent.statistics, rank=self.size, bias=has_bias)
        state = {f"{name}.weight": matrix for name, matrix in zip(self.factors, matrices, strict=True)}
        if bias_D is not None:
            state[f"{self.factors[0]}.bias"] = bias_D
        return parent.norm | {name: tensor.to(parent.dtype).contiguous() for name, tensor in state.items()}


@register
@dataclass(frozen=True)
class LinearAttention(_Linear):
    subblock = "attention"
    module = PuzzleLinearMixer
    factors = ("self_attn.linear_attn",)
    cell = "linear attention"


@register
@dataclass(frozen=True)
class LinearFFN(_Linear):
    subblock = "ffn"
    module = PuzzleLinearMLP
    factors = ("mlp.linear_mlp",)
    cell = "linear FFN"


@register
@dataclass(frozen=True)
class LowRankFFN(_Linear):
    subblock = "ffn"
    kind = "low_rank"
    grammar = "rank{rank}"
    module = PuzzleLowRankMLP
    factors = ("mlp.expand_proj", "mlp.reduce_proj")
    cell = "low-rank FFN"
    rank: int

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        """Smaller than the parent's FFN, and than one linear map."""
        return 2 * self.rank < config.hidden_size and self.num_params(config) < parent.num_params(config)

    def output_projection(self, config: PuzzleConfig) -> str:
        return self.factors[0]

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, LowRankFFN) or wider.rank < self.rank:
            return None
        missing = wider.rank - self.rank
        return state | {
            "mlp.reduce_proj.weight": pad(state["mlp.reduce_proj.weight"], (0, 0, 0, missing)),
            "mlp.expand_proj.weight": pad(state["mlp.expand_proj.weight"], (0, missing)),
        }
