"""One linear map instead of the FFN (paper section 2.1)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Subblock, Variant
from puzzle.variants.linear import linear_loss, linear_start
from puzzle.variants.registry import register

_LINEAR = "mlp.linear_mlp"


class PuzzleLinearMLP(nn.Module):
    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


@register
@dataclass(frozen=True)
class LinearFFN(Variant):
    subblock: ClassVar[Subblock] = "ffn"
    kind: ClassVar[str] = "linear"
    grammar: ClassVar[str] = "linear"
    module: ClassVar[type[nn.Module] | None] = PuzzleLinearMLP
    closed_form: ClassVar[bool] = True

    @property
    def description(self) -> str:
        return "linear map"

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return not own.closed_form

    @property
    def cell(self) -> str:
        return "linear FFN"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"replace_with_linear": True}

    def initialise(self, parent: ParentSubblock) -> State:
        """The ridge regression from the normed input to the subblock's output; with the paper's start, W_down W_up."""
        return linear_start(self, parent, _LINEAR)

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return linear_loss(parent.statistics, state[f"{_LINEAR}.weight"], state.get(f"{_LINEAR}.bias"))
