"""One linear map instead of attention (each token attends to itself alone) or of the FFN (paper section 2.1)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant
from puzzle.variants.least_squares import linear_loss, ridge
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
