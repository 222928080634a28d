"""What a target can bound, in one table: each quantity's setting, key, unit, direction and formula, and its words.

The recipe's `target` and `search.objective`, the artefacts `Bounds` and `Totals`, the rows of the search's program,
explanations and the report's tables all follow from it: a new quantity is one row here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from operator import attrgetter
from typing import TYPE_CHECKING

from puzzle.units import BYTES, COUNT, MILLISECONDS, NUMBER, SPEED, Unit

if TYPE_CHECKING:
    from puzzle.artefacts import Totals

TIME_TOLERANCE = 1e-8
"""Relative violation at which a bound on times still counts as met: far below noise, far above rounding of floats."""


@dataclass(frozen=True)
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
    unit: Unit
    columns: tuple[str, ...]
    """Fields of `Cost` that it follows from; empty for the score."""
    additive: Callable[["Totals"], float]
    """The sum over layers behind it, in base units (bytes, ms, count)."""
    meaning: str
    """One sentence: what is counted."""
    at_least: bool = False
    """Larger is better, and the sum behind it is the request time."""
    exact: bool = False
    """Counted rather than timed: whole numbers, compared without tolerance, bounded without margin."""
    digits: int = 3
    """Significant digits for people."""

    @property
    def direction(self) -> str:
        return "at least" if self.at_least else "at most"

    def value(self, totals: "Totals") -> float:
        """Of a whole model; a throughput is 0 where no times are known."""
        total = self.additive(totals)
        return self.convert(total, totals.batch_size, totals.generated_tokens) if self.at_least and total else total

    def convert(self, value: float, batch_size: int, generated_tokens: int) -> float:
        """From a value to its sum over layers, or back: the throughput's rule is its own inverse."""
        return 1e3 * batch_size * generated_tokens / value if self.at_least else value

    def known(self, value: float) -> float:
        """`value`, or NaN, a dash for people, where it is noise: no model takes no time."""
        return value if value > 0 or self.exact or not self.columns else math.nan

    def utilisation(self, value: float, bound: float) -> float:
        """Share of the bound that a value takes: at most 1 where it is met; infinite above a bound of 0."""
        if self.at_least and value <= 0:  # of what takes no time
            return 0.0
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

    def stricter(self, bound: float, factor: float) -> float:
        """A bound on predictions that leaves room for measurements to be worse; back again by the inverse factor."""
        if self.exact or not self.columns:
            return bound
        return bound * factor if self.at_least else bound / factor

    def text(self, value: float) -> str:
        """For people: `2,480 tok/s`, `24.0 GB`; `-` if not finite."""
        return self.unit.text(value, self.digits)

    def setting_text(self, value: float, rounding: str = ROUND_HALF_EVEN) -> str:
        """As the recipe reads it, with four significant digits: `2480 tok/s`, `24GB`."""
        number, unit = self.unit.scaled(value)
        return plain_digits(number, rounding) + (f" {unit}" if "/" in unit else unit)


_TIMES = ("prefill_ms", "decode_ms")
_REQUEST_MS = attrgetter("request_ms")
# fmt: off
_QUANTITIES = (
    Quantity("throughput", "throughput_tok_s", "throughput", SPEED, _TIMES, _REQUEST_MS,
             "generated tokens per second of the whole batch, prefill time included, prompt tokens not counted",
             at_least=True, digits=4),
    Quantity("latency", "request_ms", "time of a request", MILLISECONDS, _TIMES, _REQUEST_MS,
             "time from a batch of prompts to its last tokens"),
    Quantity("time_per_output_token", "decode_ms", "time per output token", MILLISECONDS, ("decode_ms",),
             attrgetter("cost.decode_ms"),
             "time of one decode step of the whole batch, at the scenario's middle context length"),
    Quantity("time_to_first_token", "prefill_ms", "time to first token", MILLISECONDS, ("prefill_ms",),
             attrgetter("cost.prefill_ms"), "time from a batch of prompts to its first tokens: the prefill"),
    Quantity("memory", "memory_bytes", "memory", BYTES, ("weight_bytes", "kv_bytes_per_sequence"),
             attrgetter("memory_bytes"),
             "weights, and the KV cache of a full batch at full length; the engine's workspace not counted",
             exact=True),
    Quantity("parameters", "params", "parameters", COUNT, ("params",), attrgetter("cost.params"),
             "parameters of the whole model; tied embeddings are counted once", exact=True),
    Quantity("disk", "weight_bytes", "weights on disk", BYTES, ("weight_bytes",), attrgetter("cost.weight_bytes"),
             "weights alone, as a checkpoint of the scenario's dtype", exact=True),
    Quantity("score", "score", "sum of scores", NUMBER, (), lambda totals: 0.0,  # its terms are in the score table
             "sum of the blocks' scores, with `search.objective` for what is to be best then", digits=4),
)
# fmt: on

QUANTITIES = {quantity.key: quantity for quantity in _QUANTITIES}
"""By key, in the order in which a target that cannot be met is loosened."""
COSTS = {key: quantity for key, quantity in QUANTITIES.items() if quantity.columns}
"""All but the score: what a cost table gives."""
SETTINGS = {quantity.setting: quantity for quantity in _QUANTITIES}
"""By the name in the recipe's `target`."""


def check_setting(setting: str) -> str:
    """`setting`, if it names a quantity."""
    if setting not in SETTINGS:
        raise ValueError(f"found {setting!r}; it must be one of {', '.join(SETTINGS)}")
    return setting


def plain_digits(value: float, rounding: str = ROUND_HALF_EVEN) -> str:
    """Four significant digits without an exponent or separators, which no one writes into a recipe."""
    exact = Decimal(str(value))
    step = Decimal(1).scaleb(exact.adjusted() - 3)
    return f"{exact.quantize(step, rounding).normalize():f}"
