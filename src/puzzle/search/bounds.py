"""What a target bounds: the quantities, what of each adds up over layers, and when a model meets its bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from puzzle.artefacts import Bounds, CostTable, ScoreName, ScoreTable, Totals
from puzzle.errors import PuzzleError
from puzzle.recipe import TargetSettings

TIME_TOLERANCE = 1e-8
"""Relative excess at which a bound on a time still counts as met: far below measurement noise, far above rounding of
floats. Bytes and parameters are whole numbers and have no tolerance.
"""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One quantity a target can bound.

    Solvers need sums over layers with an upper limit. All quantities but the throughput are such sums; a throughput of
    at least t is a request time of at most batch * generated tokens / t (paper section 2.3).
    """

    name: str
    """In `Bounds` and `Totals.as_dict`."""
    setting: str
    """In the recipe's `target`."""
    additive: Callable[[Totals], float]
    """The sum over layers behind it."""
    columns: tuple[str, ...]
    """What of `Cost` it follows from."""
    at_least: bool = False
    """The throughput: its bound is a lower one, and its sum the request time."""
    whole: bool = False
    """Counted in whole numbers, so compared exactly."""

    def convert(self, value: float, batch_size: int, generated_tokens: int) -> float:
        """From a value of the quantity to its sum over layers, or back: the throughput's rule is its own inverse."""
        if not self.at_least:
            return value
        if value <= 0:
            raise no_time(value)
        return 1e3 * batch_size * generated_tokens / value

    def tightened(self, bound: float, margin: float) -> float:
        """The bound on predictions that leaves room for measurements to be worse by the share `margin`."""
        if self.whole:
            return bound
        return bound * (1 + margin) if self.at_least else bound / (1 + margin)

    def promised(self, predicted: float, margin: float) -> float:
        """What a target may ask for when `predicted` is reached: the inverse of `tightened`."""
        if self.whole:
            return predicted
        return predicted / (1 + margin) if self.at_least else predicted * (1 + margin)

    def best(self, values: Sequence[float]) -> float | None:
        """The best of the values of several models; None of none."""
        return max(values, default=None) if self.at_least else min(values, default=None)

    def load(self, totals: Totals, bound: float) -> float:
        """What share of its limit the sum takes; infinite of a limit of 0, if it is more."""
        value, limit = self.additive(totals), self.convert(bound, totals.batch_size, totals.generated_tokens)
        if limit == 0:
            return math.inf if value > 0 else 1.0
        return value / limit

    def excess(self, totals: Totals, bound: float) -> float:
        """By what share of its limit the sum is above it; 0 if `totals` meets `bound`."""
        share = max(0.0, self.load(totals, bound) - 1)
        return share if self.whole or share > TIME_TOLERANCE else 0.0


def no_time(predicted_ms: float) -> PuzzleError:
    return PuzzleError(
        f"cost: a model is predicted to take {predicted_ms:g} ms, which is noise; raise cost.repeats and measure again"
    )


QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity(
            name="throughput_tok_s",
            setting="throughput",
            additive=lambda totals: totals.request_ms,
            columns=("prefill_ms", "decode_ms"),
            at_least=True,
        ),
        Quantity(
            name="request_ms",
            setting="latency",
            additive=lambda totals: totals.request_ms,
            columns=("prefill_ms", "decode_ms"),
        ),
        Quantity(
            name="decode_ms",
            setting="time_per_output_token",
            additive=lambda totals: totals.cost.decode_ms,
            columns=("decode_ms",),
        ),
        Quantity(
            name="prefill_ms",
            setting="time_to_first_token",
            additive=lambda totals: totals.cost.prefill_ms,
            columns=("prefill_ms",),
        ),
        Quantity(
            name="memory_bytes",
            setting="memory",
            additive=lambda totals: totals.memory_bytes,
            columns=("weight_bytes", "kv_bytes_per_sequence"),
            whole=True,
        ),
        Quantity(
            name="params",
            setting="parameters",
            additive=lambda totals: totals.cost.params,
            columns=("params",),
            whole=True,
        ),
        Quantity(
            name="weight_bytes",
            setting="disk",
            additive=lambda totals: totals.cost.weight_bytes,
            columns=("weight_bytes",),
            whole=True,
        ),
    )
}
"""By name, in the order in which a target that cannot be met is loosened."""


def parent_totals(scores: ScoreTable, costs: CostTable) -> dict[str, float]:
    """The parent's predicted totals that relative targets refer to, as `Totals.as_dict`.

    One rule for every quantity: at the allowed batch size where the parent's throughput is highest, the smallest of
    these if there are several. So `2x` of throughput and `50%` of memory speak of the same parent, served as
    well as the scenario lets it be.
    """
    blocks = [scores.parent_row(layer).block for layer in range(scores.num_layers)]
    totals = [costs.totals(blocks, batch_size) for batch_size in sorted(costs.batch_sizes)]
    return dict(max(totals, key=lambda each: each.throughput_tok_s).as_dict())


def quantity_of(setting: str) -> str:
    """The name of what `setting` bounds in a target; the score is called the same."""
    return next((name for name, quantity in QUANTITIES.items() if quantity.setting == setting), setting)


def resolve_bounds(target: TargetSettings, parent: Mapping[str, float], margin: float = 0.0) -> Bounds:
    """The target's bounds as absolute values; `2x` and `80%` are of `parent`, see `parent_totals`.

    Args:
        margin: share by which speeds and times are bounded tighter, since their predictions have errors.
    """
    bounds: dict[str, float] = {}
    for quantity in QUANTITIES.values():
        amount = getattr(target, quantity.setting)
        if amount is None:
            continue
        value = amount.resolve(parent[quantity.name])
        # 1.234 * 1e9 must not end one byte short of 1234000000.
        bounds[quantity.name] = math.floor(value + 1e-3) if quantity.whole else quantity.tightened(value, margin)
        if bounds[quantity.name] <= 0:
            raise PuzzleError(f"target.{quantity.setting}: {amount.text} is {value:g}; set more than that")
    return Bounds(**bounds, score=target.score)


def evaluate_blocks(
    scores: ScoreTable, costs: CostTable, blocks: Sequence[str], batch_size: int, score: ScoreName = "kl"
) -> tuple[float, Totals]:
    """Summed score and predicted totals of an architecture, from the raw tables, bytes and parameters as integers."""
    assert len(blocks) == scores.num_layers, f"{len(blocks)} blocks for {scores.num_layers} layers"
    return scores.total(blocks, score), costs.totals(blocks, batch_size)


def excesses(totals: Totals, bounds: Bounds) -> dict[str, float]:
    """The bounds that `totals` does not meet, each with its `Quantity.excess`."""
    found = {name: QUANTITIES[name].excess(totals, bound) for name, bound in bounds.given().items()}
    return {name: excess for name, excess in found.items() if excess > 0}
