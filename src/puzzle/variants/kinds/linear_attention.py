"""One linear map instead of attention: each token attends to itself alone (paper section 2.1)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Subblock, Variant
from puzzle.variants.linear import linear_loss, linear_start
from puzzle.variants.registry import register

_LINEAR = "self_attn.linear_attn"


class PuzzleLinearMixer(nn.Module):
    """Its name must not say attention, see docs/adding-a-variant.md."""

    def __init__(self, config: Any, entry: dict[str, Any]) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


@register
@dataclass(frozen=True)
class LinearAttention(Variant):
    subblock: ClassVar[Subblock] = "attention"
    kind: ClassVar[str] = "linear"
    grammar: ClassVar[str] = "linear"
    module: ClassVar[type[nn.Module] | None] = PuzzleLinearMixer
    closed_form: ClassVar[bool] = True

    @property
    def description(self) -> str:
        return "linear map"

    def fits(self, own: Variant, config: PuzzleConfig) -> bool:
        return not own.closed_form

    @property
    def cell(self) -> str:
        return "linear attention"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"replace_with_linear": True}

    def initialise(self, parent: ParentSubblock) -> State:
        """The ridge regression from the normed input to the subblock's output; with the paper's start, W_o W_v."""
        return linear_start(self, parent, _LINEAR)

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return linear_loss(parent.statistics, state[f"{_LINEAR}.weight"], state.get(f"{_LINEAR}.bias"))
