"""The gated FFN: the parent variant, and narrower ones (paper section 2.1 and appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant, register
from puzzle.variants.least_squares import least_squares_update

FFN_FRACTIONS = (0.87, 0.75, 0.5, 0.25, 0.2, 0.1)
"""Default widths as shares of the parent's (paper section 2.1)."""
_ROWS = ("mlp.gate_proj", "mlp.up_proj")  # modules whose tensors' rows are the channels


@register
@dataclass(frozen=True)
class GatedFFN(Variant):
    """The family's gated FFN with `intermediate_size` channels; with the parent's number, the parent variant."""

    subblock = "ffn"
    kind = "gated"
    grammar = "w{intermediate_size}"
    output_projection = "mlp.down_proj"
    recorded = "mlp.down_proj"
    setting = "ffn_widths"
    cell = "narrower FFN"
    intermediate_size: int

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return isinstance(parent, GatedFFN) and self.intermediate_size < parent.intermediate_size

    def alternatives(self, config: PuzzleConfig, sizes: Sequence[int] | None = None) -> list[Variant]:
        """The paper's fractions of the width, rounded to multiples that engines and tensor cores like."""
        width = self.intermediate_size
        multiple = min(256, max(1, 2 ** (width.bit_length() - 5)))  # less than 256 for small models
        default = {max(multiple, round(fraction * width / multiple) * multiple) for fraction in FFN_FRACTIONS}
        return [GatedFFN(width) for width in sorted(default if sizes is None else sizes, reverse=True)]

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"intermediate_size": self.intermediate_size}

    def initialise(self, parent: ParentSubblock) -> State:
        """Keep the first channels of the ranking, and update the down projection for them by least squares.

        With the paper's starts, its columns stay as they are. A bias stays the parent's in any case.
        """
        if parent.variant == self:
            return dict(parent.state)
        kept, down_DI = parent.channels[: self.intermediate_size].sort().values, parent.state["mlp.down_proj.weight"]
        rows = {name: tensor[kept].clone() for name, tensor in parent.state.items() if name.startswith(_ROWS)}
        if parent.settings.start == "paper":
            return parent.state | rows | {"mlp.down_proj.weight": down_DI[:, kept].clone()}
        moment_II = parent.statistics["activation_second_moment"].double()
        updated = least_squares_update(down_DI.double(), moment_II, kept)
        return parent.state | rows | {"mlp.down_proj.weight": updated.to(down_DI.dtype)}

    def widen(self, state: State, wider: Variant) -> State | None:
        if not isinstance(wider, GatedFFN) or wider.intermediate_size < self.intermediate_size:
            return None
        missing = wider.intermediate_size - self.intermediate_size
        widened = {"mlp.down_proj.weight": pad(state["mlp.down_proj.weight"], (0, missing))}
        for name in (name for name in state if name.startswith(_ROWS)):
            widened[name] = pad(state[name], (0, 0) * (state[name].ndim - 1) + (0, missing))
        return state | widened

    def linear_map(self, state: State) -> tuple[Tensor, Tensor | None]:
        """W_down W_up: the gate is ignored."""
        down_DI, bias = state["mlp.down_proj.weight"].double(), state.get("mlp.down_proj.bias")
        if (up_bias := state.get("mlp.up_proj.bias")) is not None:
            bias = down_DI @ up_bias.double() + (0 if bias is None else bias.double())
        return down_DI @ state["mlp.up_proj.weight"].double(), bias
