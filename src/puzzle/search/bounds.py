"""Targets as absolute bounds, and which of them a model violates."""

import math
from collections.abc import Mapping, Sequence

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, SETTINGS
from puzzle.recipe import SearchSettings, TargetSettings


def parent_totals(scores: ScoreTable, costs: CostTable) -> dict[str, float]:
    """The parent's predicted totals that relative targets refer to, as `Totals.as_dict`.

    One rule for every quantity: at the allowed batch size where the parent's throughput is highest, the smallest of
    these if there are several. So `2x` of throughput and `50%` of memory speak of the same parent, served as
    well as the scenario lets it be.
    """
    totals = [costs.totals(scores.parent_blocks, batch_size).as_dict() for batch_size in sorted(costs.batch_sizes)]
    return max(totals, key=lambda each: each["throughput_tok_s"])


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


def violations(values: Mapping[str, float], bounds: Bounds) -> dict[str, float]:
    """The bounds that are violated, each with its `Quantity.violation`."""
    found = {key: QUANTITIES[key].violation(values[key], bound) for key, bound in bounds.items()}
    return {key: share for key, share in found.items() if share > 0}


def check_asked(targets: Sequence[TargetSettings], settings: SearchSettings) -> None:
    """Refuse targets that bound nothing, or whose best architecture is trivial.

    Args:
        targets: of the main scenario, then of the further ones.
    """
    given = [{setting for setting, amount in target if amount is not None} for target in targets]
    if not any(given):
        raise PuzzleError(
            f"target: nothing is set; set at least one of {', '.join(SETTINGS)}, for example `throughput: 2x`"
        )
    if settings.objective == "score" and not set().union(*given) - {"score"}:
        raise PuzzleError(
            "target.score: alone it is met best by the parent itself; bound a cost too, or set search.objective"
        )
    if settings.objective != "score" and "score" not in given[0]:
        raise PuzzleError(
            f"search.objective: {settings.objective} alone would give up all quality; set target.score, the highest "
            "sum of scores that you accept"
        )
