"""Two linear maps through a few channels, with nothing between them, instead of the FFN."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant
from puzzle.variants.least_squares import linear_loss, reduced_rank
from puzzle.variants.registry import register


class PuzzleLowRankMLP(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.reduce_proj = nn.Linear(config.hidden_size, entry["rank"], bias=False)
        self.expand_proj = nn.Linear(entry["rank"], config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.expand_proj(self.reduce_proj(hidden_states))


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
