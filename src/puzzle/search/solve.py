"""From tables and a target to the solution, or why there is none; pools of solutions, and the frontier."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR
from functools import partial
from typing import NamedTuple, cast

import numpy as np

from puzzle.artefacts import Bounds, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, Quantity, plain_digits
from puzzle.runs import progress
from puzzle.search.constraints import check_asked
from puzzle.search.exact import best
from puzzle.search.tables import Demand, Objective, Tables
from puzzle.units import Amount


def solve(tables: Tables) -> Solution:
    """The best architecture that meets the target, by default that of the lowest summed score.

    Raises:
        PuzzleError: a setting is contradictory, or the target is empty or cannot be met, with what can be reached.
    """
    check_asked([demand.target for demand in tables.demands], tables.settings)
    solution = best(tables, objective=tables.objective)
    if solution is None:
        raise _explain(tables)
    return solution


def pool(tables: Tables, count: int, differing: int) -> list[Solution]:
    """The `count` best architectures, each of which differs from all others in at least `differing` layers.

    Each is proven to be the best of those that differ enough from the ones before it, for `differing` above 1 to a
    relative gap of 1e-3. Fewer where there are no more, or none is found in time.

    Raises:
        PuzzleError: as `solve`, or `differing` is not from 1 to the number of layers.
    """
    num_layers, objective = tables.scores.num_layers, tables.objective
    if not 1 <= differing <= num_layers:
        raise PuzzleError(f"pool: found differing {differing}; it must be from 1 to the {num_layers} layers")
    found, find = [solve(tables)], partial(best, objective=objective, differing=differing)
    # Finer than the scores' own noise, and many times faster than a tighter gap.
    gap = max(tables.settings.gap, 1e-3 if differing > 1 else 0.0)
    tables = replace(tables, settings=tables.settings.model_copy(update={"gap": gap}))
    with suppress(PuzzleError), progress("pool", count) as bar:  # an error: time was over
        while len(found) < count and (other := find(tables, others=[each.blocks for each in found])):
            found.append(other)
            bar.advance()
    return sorted(found, key=objective.minimised)


def frontier(tables: Tables, key: str = "throughput_tok_s", points: int = 16, end: float = 4.0) -> list[Solution]:
    """Exact solutions at `points` bounds on a quantity, in equal steps from the parent's value to one `end` times as
    good, or to the best reachable. One that meets the next bound as well is listed once.

    All other bounds are kept. Where these already force a value no better than the parent's, there is one point: the
    best reachable. Each solution's `bounds` say which bound it was found for.

    Raises:
        PuzzleError: the other bounds cannot be met.
    """
    quantity = QUANTITIES[key]
    tables = replace(tables, target=tables.target.model_copy(update={quantity.setting: None}))
    parent = tables.demands[0].parent[key]

    def at(value: float) -> Solution | None:
        bounds = [tables.bounds[0] | {key: value}, *tables.bounds[1:]]
        found = best(tables, bounds)
        return found and replace(found, asked=bounds[0], bounds=bounds[0])

    solutions: list[Solution] = []
    for value in np.linspace(parent, parent * end if quantity.at_least else parent / end, points).tolist():
        if solutions and not quantity.violation(solutions[-1].predicted[key], value):
            continue
        if solution := at(value):
            solutions.append(solution)
            continue
        if (extreme := best(tables, objective=Objective(key))) is None:
            raise _explain(tables)
        if not solutions or quantity.better(extreme.predicted[key], solutions[-1].predicted[key]):
            solutions += filter(None, [at(extreme.predicted[key])])
        break
    return solutions


class _Ask(NamedTuple):
    """One bound of a target, in words. Values are what can be asked for: predictions with the margin taken off."""

    scenario: int
    demand: Demand
    quantity: Quantity

    @property
    def setting(self) -> str:
        return f"{self.demand.setting}.{self.quantity.setting}"

    @property
    def amount(self) -> Amount:
        return cast(Amount, getattr(self.demand.target, self.quantity.setting))

    def __str__(self) -> str:
        absolute = self.quantity.setting_text(self.demand.asked[self.quantity.key])
        return f"{self.setting}: " + (f"{self.amount.text} ({absolute})" if self.amount.relative else absolute)

    def best(self, tables: Tables, bounds: Sequence[Bounds]) -> float | None:
        """The best value of any architecture within `bounds`."""
        objective = Objective(self.quantity.key, self.scenario)
        if (solution := best(tables, bounds, objective=objective)) is None:
            return None
        return self.quantity.stricter(objective.reached(solution), 1 / (1 + self.demand.margin))

    def text(self, value: float, unit: str = "") -> str:
        """Rounded to the side that can be met: `9120 tok/s`, or in a unit relative to the parent, `3.68x`, `28%`."""
        rounding = ROUND_FLOOR if self.quantity.at_least else ROUND_CEILING
        if not unit:
            return self.quantity.setting_text(value, rounding)
        worth = 100 if unit == "%" else 1
        return plain_digits(worth * value / self.demand.parent[self.quantity.key], rounding) + unit

    def range(self, value: float) -> str:
        """`2480 tok/s (parent) to 9120 tok/s (3.68x)`."""
        parent = self.demand.parent.get(self.quantity.key, 0.0)
        ratio = f" ({self.text(value, 'x')})" if parent else ""
        return f"{self.quantity.setting_text(parent)} (parent) to {self.text(value)}{ratio}"


def _explain(tables: Tables) -> PuzzleError:
    """One line for a target that no architecture meets.

    Names the bounds that are out of reach, each with the range from the parent's value to the best of any architecture.
    Where one bound is to blame, or any could give way, it ends with the nearest value that the others allow.
    """
    asks = [_Ask(place, each, QUANTITIES[key]) for place, each in enumerate(tables.demands) for key in each.bounds]
    beyond, ranges = [], []
    for ask in asks:
        value = ask.best(tables, [{} for _ in tables.demands])
        if value is not None and ask.quantity.violation(value, ask.demand.asked[ask.quantity.key]):
            beyond.append(ask)
            ranges.append(f"{ask} asked; reachable {ask.range(value)}")
    if len(beyond) > 1:
        return PuzzleError(f"{'; '.join(ranges)}; set each within its range")
    kept = " with the other bounds kept" if len(asks) > 1 else ""
    end = "giving way in one alone is not enough; loosen several"
    if beyond:
        end = "nothing was found within the other bounds either"
    for ask in beyond or asks:
        others = [dict(each) for each in tables.bounds]
        del others[ask.scenario][ask.quantity.key]
        if (value := ask.best(tables, others)) is not None:
            nearest = ask.text(value, ask.amount.text[-1] if ask.amount.relative else "")
            end = f"nearest{kept}: " + (nearest if beyond else f"{ask.setting}: {nearest}")
            break
    if beyond:
        return PuzzleError(f"{ranges[0]}; {end}")
    return PuzzleError(f"{', '.join(map(str, asks))}: each alone can be met, together they cannot; {end}")
