"""Targets as absolute bounds, and when a model meets them."""

import math
from collections.abc import Mapping, Sequence

from puzzle.artefacts import Bounds, CostTable, ScoreName, ScoreTable, Totals
from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS, QUANTITIES
from puzzle.recipe import TargetSettings


def no_time(predicted_ms: float) -> PuzzleError:
    return PuzzleError(
        f"cost: a model is predicted to take {predicted_ms:g} ms, which is noise; raise cost.repeats and measure again"
    )


def parent_totals(scores: ScoreTable, costs: CostTable) -> dict[str, float]:
    """The parent's predicted totals that relative targets refer to, as `Totals.as_dict`.

    One rule for every quantity: at the allowed batch size where the parent's throughput is highest, the smallest of
    these if there are several. So `2x` of throughput and `50%` of memory speak of the same parent, served as
    well as the scenario lets it be.
    """
    blocks = [scores.parent_row(layer).block for layer in range(scores.num_layers)]
    totals = [costs.totals(blocks, batch_size) for batch_size in sorted(costs.batch_sizes)]
    return max(totals, key=lambda each: each.throughput_tok_s).as_dict()


def resolve_bounds(target: TargetSettings, parent: Mapping[str, float], margin: float = 0.0) -> Bounds:
    """The target's bounds as absolute values; `2x` and `80%` are of `parent`, see `parent_totals`.

    Args:
        margin: share by which speeds and times are bounded tighter, since their predictions have errors.
    """
    bounds: Bounds = {}
    for key, quantity in QUANTITIES.items():
        amount = getattr(target, quantity.setting)
        if amount is None:
            continue
        value = amount.resolve(parent.get(key, 0.0))
        # 1.234 * 1e9 must not end one byte short of 1234000000.
        bounds[key] = math.floor(value + 1e-3) if quantity.exact else quantity.with_margin(value, margin)
        if bounds[key] <= 0:
            raise PuzzleError(f"target.{quantity.setting}: {amount.text} is {value:g}; set more than that")
    return bounds


def evaluate_blocks(
    scores: ScoreTable, costs: CostTable, blocks: Sequence[str], batch_size: int, score: ScoreName = "kl"
) -> tuple[float, Totals]:
    """Summed score and predicted totals of an architecture, from the raw tables, bytes and parameters as integers."""
    assert len(blocks) == scores.num_layers, f"{len(blocks)} blocks for {scores.num_layers} layers"
    return scores.total(blocks, score), costs.totals(blocks, batch_size)


def excesses(totals: Totals, bounds: Bounds) -> dict[str, float]:
    """The bounds on costs that `totals` does not meet, each with its `Quantity.violation`."""
    values = totals.as_dict()
    found = {name: COSTS[name].violation(values[name], bound) for name, bound in bounds.items() if name in COSTS}
    return {name: excess for name, excess in found.items() if excess > 0}


def without(bounds: Bounds, *keys: str) -> Bounds:
    return {key: bound for key, bound in bounds.items() if key not in keys}
