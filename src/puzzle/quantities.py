"""What a target can bound, in one table: each quantity's setting, key, unit, direction and formula, and its words.

The recipe's `target` and `search.objective`, the artefacts `Bounds` and `Totals`, the rows of the search's program,
explanations and the report's tables all follow from it: a new quantity is one row here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any

from puzzle import units

if TYPE_CHECKING:
    from puzzle.artefacts.costs import Totals

TIME_TOLERANCE = 1e-8
"""Relative violation at which a bound still counts as met: far below measurement noise, far above rounding of floats.
Bytes and parameters are whole numbers and have no tolerance.
"""

_MILLISECONDS = ((1.0, "ms"),)
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One quantity of a model in a scenario.

    The search needs sums over layers with an upper limit. All quantities are such sums, except the throughput: at
    least t tok/s is a request time of at most batch * generated tokens / t (paper section 2.3).
    """

    setting: str
    """Name in the recipe's `target`."""
    key: str
    """Name in `Bounds`, `Totals.as_dict` and the result table."""
    label: str
    """For people, as in `throughput at least 2,000 tok/s`."""
    meaning: str
    """One sentence: what is counted."""
    amount: Any
    """Pydantic type of the setting."""
    scales: Sequence[tuple[float, str]]
    """Units in which values are written, the largest first; the recipe reads them too."""
    digits: int = 3
    """Significant digits for people."""
    additive: Callable[["Totals"], float]
    """The sum over layers behind it, in base units (bytes, ms, count)."""
    columns: tuple[str, ...]
    """Fields of `Cost` that it follows from; empty for the score."""
    at_least: bool = False
    """Larger is better, and the sum behind it is the request time."""
    exact: bool = False
    """Counted rather than timed: whole numbers, compared without tolerance, bounded without margin."""

    def value(self, totals: "Totals") -> float:
        """Of a whole model; a throughput is 0 where no times are known."""
        total = self.additive(totals)
        return self.convert(total, totals.batch_size, totals.generated_tokens) if self.at_least and total else total

    def convert(self, value: float, batch_size: int, generated_tokens: int) -> float:
        """From a value to its sum over layers, or back: the throughput's rule is its own inverse."""
        return 1e3 * batch_size * generated_tokens / value if self.at_least else value

    def utilisation(self, value: float, bound: float) -> float:
        """Share of the bound that a value takes: at most 1 where it is met; infinite above a bound of 0."""
        above, below = (bound, value) if self.at_least else (value, bound)
        if below == 0:
            return math.inf if above > 0 else 1.0
        return above / below

    def violation(self, value: float, bound: float) -> float:
        """Share by which a value violates the bound; 0 where it is met."""
        share = max(0.0, self.utilisation(value, bound) - 1)
        return share if self.exact or share > TIME_TOLERANCE else 0.0

    def better(self, one: float, other: float) -> bool:
        return one > other if self.at_least else one < other

    def with_margin(self, bound: float, margin: float) -> float:
        """The bound on predictions that leaves room for measurements to be worse by the share `margin`."""
        return bound if self.exact or not self.columns else self._scaled(bound, 1 + margin)

    def without_margin(self, predicted: float, margin: float) -> float:
        """The bound that a predicted value meets with this margin: the inverse of `with_margin`."""
        return predicted if self.exact or not self.columns else self._scaled(predicted, 1 / (1 + margin))

    def text(self, value: float) -> str:
        """For people: `2,480 tok/s`, `24.0 GB`; `-` if not finite."""
        return units.format_scaled(value, self.scales, self.digits)

    def setting_text(self, value: float, rounding: str = ROUND_HALF_EVEN) -> str:
        """As the recipe reads it, with four significant digits: `2480 tok/s`, `24GB`."""
        scale, unit = next((item for item in self.scales if abs(value) >= item[0]), self.scales[-1])
        return plain_digits(value / scale, rounding) + (f" {unit}" if "/" in unit else unit)

    @property
    def direction(self) -> str:
        return "at least" if self.at_least else "at most"

    def _scaled(self, value: float, factor: float) -> float:
        return value * factor if self.at_least else value / factor


def _table(quantities: Iterable[Quantity]) -> dict[str, Quantity]:
    return {quantity.key: quantity for quantity in quantities}


QUANTITIES = _table(
    (
        Quantity(
            setting="throughput",
            key="throughput_tok_s",
            label="throughput",
            meaning="generated tokens per second of the whole batch, prefill time included, prompt tokens not counted",
            amount=units.Speed,
            scales=((1.0, "tok/s"),),
            digits=4,
            additive=lambda totals: totals.request_ms,
            columns=("prefill_ms", "decode_ms"),
            at_least=True,
        ),
        Quantity(
            setting="latency",
            key="request_ms",
            label="time of a request",
            meaning="time from a batch of prompts to its last tokens",
            amount=units.Milliseconds,
            scales=_MILLISECONDS,
            additive=lambda totals: totals.request_ms,
            columns=("prefill_ms", "decode_ms"),
        ),
        Quantity(
            setting="time_per_output_token",
            key="decode_ms",
            label="time per output token",
            meaning="time of one decode step of the whole batch, at the scenario's middle context length",
            amount=units.Milliseconds,
            scales=_MILLISECONDS,
            additive=lambda totals: totals.cost.decode_ms,
            columns=("decode_ms",),
        ),
        Quantity(
            setting="time_to_first_token",
            key="prefill_ms",
            label="time to first token",
            meaning="time from a batch of prompts to its first tokens: the prefill",
            amount=units.Milliseconds,
            scales=_MILLISECONDS,
            additive=lambda totals: totals.cost.prefill_ms,
            columns=("prefill_ms",),
        ),
        Quantity(
            setting="memory",
            key="memory_bytes",
            label="memory",
            meaning="weights, and the KV cache of a full batch at full length; the engine's workspace not counted",
            amount=units.Bytes,
            scales=units.BYTE_SCALES,
            additive=lambda totals: totals.memory_bytes,
            columns=("weight_bytes", "kv_bytes_per_sequence"),
            exact=True,
        ),
        Quantity(
            setting="parameters",
            key="params",
            label="parameters",
            meaning="parameters of the whole model; tied embeddings are counted once",
            amount=units.CountAmount,
            scales=_COUNTS,
            additive=lambda totals: totals.cost.params,
            columns=("params",),
            exact=True,
        ),
        Quantity(
            setting="disk",
            key="weight_bytes",
            label="weights on disk",
            meaning="weights alone, as a checkpoint of the scenario's dtype",
            amount=units.Bytes,
            scales=units.BYTE_SCALES,
            additive=lambda totals: totals.cost.weight_bytes,
            columns=("weight_bytes",),
            exact=True,
        ),
        Quantity(
            setting="score",
            key="score",
            label="sum of scores",
            meaning="sum of the blocks' scores, with `search.objective` for what is to be best then",
            amount=units.Score,
            scales=((1.0, ""),),
            digits=4,
            additive=lambda totals: 0.0,  # its terms are in the score table
            columns=(),
        ),
    )
)
"""By key, in the order in which a target that cannot be met is loosened."""

COSTS = {key: quantity for key, quantity in QUANTITIES.items() if quantity.columns}
"""All but the score: what a cost table gives."""

SETTINGS = {quantity.setting: quantity for quantity in QUANTITIES.values()}
"""By the name in the recipe's `target`."""


def check_setting(setting: str) -> str:
    """`setting`, if it names a quantity."""
    if setting not in SETTINGS:
        raise ValueError(f"found {setting!r}; it must be one of {', '.join(SETTINGS)}")
    return setting


def plain_digits(value: float, rounding: str = ROUND_HALF_EVEN, digits: int = 4) -> str:
    """`digits` significant digits without an exponent or separators, which no one writes into a recipe."""
    exact = Decimal(str(value))
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(step, rounding).normalize():f}"
