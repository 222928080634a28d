"""The gated FFN: the parent variant, and narrower ones (paper section 2.1 and appendix A)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import Axis, ParentSubblock, State, Variant, axes, register
from puzzle.variants.least_squares import least_squares_update

FFN_FRACTIONS = (0.87, 0.75, 0.5, 0.25, 0.2, 0.1)
"""Default widths as shares of the parent's (paper section 2.1)."""


@register
@dataclass(frozen=True)
class GatedFFN(Variant):
    """The family's gated FFN with `intermediate_size` channels; with the parent's number, the parent variant."""

    subblock = "ffn"
    kind = "gated"
    grammar = "w{intermediate_size}"
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

    def output_projection(self, config: PuzzleConfig) -> str:
        """The matrix whose columns are the channels, whatever the family calls it."""
        (name,) = (name for name, axis in self._axes(config).items() if axis.dim == 1)
        return name.removesuffix(".weight")

    def recorded(self, config: PuzzleConfig) -> str:
        return self.output_projection(config)

    def initialise(self, parent: ParentSubblock) -> State:
        """Keep the first channels of the ranking, and update the down projection for them by least squares.

        With the paper's starts, its columns stay as they are. A bias stays the parent's in any case.
        """
        if parent.variant == self:
            return dict(parent.state)
        assert isinstance(parent.variant, GatedFFN)
        kept, down = parent.channels[: self.intermediate_size].sort().values, self.output_projection(parent.config)
        axes = parent.variant._axes(parent.config)
        state = parent.state | {
            name: axis.mapped(parent.state[name], lambda units: units[:, kept]) for name, axis in axes.items()
        }
        if parent.settings.start == "closed_form":
            down_DI = parent.state[f"{down}.weight"]
            moment_II = parent.statistics["activation_second_moment"].double()
            state[f"{down}.weight"] = least_squares_update(down_DI.double(), moment_II, kept).to(down_DI.dtype)
        return state

    def widen(self, state: State, wider: Variant, config: PuzzleConfig) -> State | None:
        if not isinstance(wider, GatedFFN) or wider.intermediate_size < self.intermediate_size:
            return None
        missing = wider.intermediate_size - self.intermediate_size

        def padded(units: Tensor) -> Tensor:
            return pad(units, (0, 0) * (units.ndim - 2) + (0, missing))

        return state | {name: axis.mapped(state[name], padded) for name, axis in self._axes(config).items()}

    def linear_map(self, state: State, config: PuzzleConfig) -> tuple[Tensor, Tensor | None]:
        """W_down W_up: the gate is ignored. Where both are one matrix, up comes last."""
        down, width = self.output_projection(config), self.intermediate_size
        down_DI, bias = state[f"{down}.weight"].double(), state.get(f"{down}.bias")
        *_, up = (name for name, axis in self._axes(config).items() if axis.dim == 0 and name.endswith(".weight"))
        if (up_bias := state.get(up.replace(".weight", ".bias"))) is not None:
            bias = down_DI @ up_bias[-width:].double() + (0 if bias is None else bias.double())
        return down_DI @ state[up][-width:].double(), bias

    def _axes(self, config: PuzzleConfig) -> dict[str, Axis]:
        return axes(self, GatedFFN(2 * self.intermediate_size), config, self.intermediate_size)
