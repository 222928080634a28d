"""Why a target cannot be met, with the nearest that can; and what to know of a target that is met."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR

from puzzle.artefacts import Bounds, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, Quantity, plain_digits
from puzzle.search.exact import Objective, best, same_sum
from puzzle.search.tables import Demand, Tables
from puzzle.units import Amount

_CLOSE = 0.01
"""Bounds with less room than this count as binding, and smaller differences in speed as none: predictions are not
that good.
"""


@dataclass(frozen=True)
class _Ask:
    """One bound of a target, in words."""

    quantity: Quantity
    demand: Demand
    scenario: int
    margin: float

    @property
    def amount(self) -> Amount:
        amount: Amount = getattr(self.demand.target, self.quantity.setting)
        return amount

    @property
    def parent(self) -> float:
        return self.demand.parent.get(self.quantity.key, 0.0)

    @property
    def setting(self) -> str:
        return f"{self.demand.setting}.{self.quantity.setting}"

    def __str__(self) -> str:
        absolute = self.quantity.setting_text(self.amount.resolve(self.parent))
        return f"{self.setting}: " + (f"{self.amount.text} ({absolute})" if self.amount.relative else absolute)

    def meets(self, predicted: float) -> bool:
        bound = self.amount.resolve(self.parent)
        return self.quantity.violation(self.quantity.without_margin(predicted, self.margin), bound) == 0

    def has_room(self, predicted: float) -> bool:
        bound = self.amount.resolve(self.parent)
        return self.quantity.utilisation(self.quantity.without_margin(predicted, self.margin), bound) < 1 - _CLOSE

    def range(self, predicted: float) -> str:
        """`2480 tok/s (parent) to 9120 tok/s (3.68x)`, the best with the margin taken off."""
        reachable = self.quantity.without_margin(predicted, self.margin)
        ratio = f" ({plain_digits(reachable / self.parent, self._rounding)}x)" if self.parent else ""
        end = self.quantity.setting_text(reachable, self._rounding)
        return f"{self.quantity.setting_text(self.parent)} (parent) to {end}{ratio}"

    def nearest(self, predicted: float) -> str:
        """The best in the terms of the target (`3.6x`, `28%`, `24GB`), rounded to the side that can be met."""
        reachable = self.quantity.without_margin(predicted, self.margin)
        if not self.amount.relative:
            return self.quantity.setting_text(reachable, self._rounding)
        if self.amount.text.strip().endswith("%"):
            return plain_digits(100 * reachable / self.parent, self._rounding) + "%"
        return plain_digits(reachable / self.parent, self._rounding) + "x"

    @property
    def _rounding(self) -> str:
        return ROUND_FLOOR if self.quantity.at_least else ROUND_CEILING


def explain(tables: Tables) -> PuzzleError:
    """One line for a target that no architecture meets.

    Names the bounds that are out of reach, each with the range from the parent's value to the best of any architecture
    that the search may choose. If each alone is within reach, it says so. Where one bound is to blame, or any
    one could give way, the line ends with the nearest value of it that can be met with the others kept.
    """
    asks = list(_asks(tables))
    unbounded: list[Bounds] = [{} for _ in tables.demands]
    reachable = {ask: _best_value(tables, unbounded, ask) for ask in asks}
    beyond = {ask: value for ask, value in reachable.items() if value is not None and not ask.meets(value)}
    ranges = [f"{ask} asked; reachable {ask.range(value)}" for ask, value in beyond.items()]
    if len(beyond) > 1:
        return PuzzleError(f"{'; '.join(ranges)}; set each within its range")
    nearest = _nearest(tables, [*beyond] or asks)
    kept = " with the other bounds kept" if len(asks) > 1 else ""
    if beyond:
        end = f"nearest{kept}: {nearest[1]}" if nearest else "nothing was found within the other bounds either"
        return PuzzleError(f"{ranges[0]}; {end}")
    end = f"nearest{kept}: {': '.join(nearest)}" if nearest else "giving way in one alone is not enough; loosen several"
    return PuzzleError(f"{', '.join(map(str, asks))}: each alone can be met, together they cannot; {end}")


def notes(tables: Tables, solution: Solution, objective: Objective) -> tuple[str, ...]:
    """One line for each bound that decides nothing, and for bounds on sizes alone that give no speed."""
    asks = [ask for ask in _asks(tables) if ask.scenario == 0]
    idle = [
        f"{ask}: decides nothing, the best architecture without it meets it too"
        for ask in asks
        if ask.quantity.key != objective.key and _is_idle(tables, ask, solution, objective)
    ]
    return (*idle, *_no_faster(asks, solution))


def _asks(tables: Tables) -> Iterator[_Ask]:
    """The bounds of all scenarios, each in the order in which they give way."""
    for scenario, demand in enumerate(tables.demands):
        for key in demand.bounds:
            yield _Ask(QUANTITIES[key], demand, scenario, tables.settings.margin)


def _best_value(tables: Tables, bounds: list[Bounds], ask: _Ask) -> float | None:
    objective = Objective(ask.quantity.key, ask.scenario)
    solution = best(tables, bounds, objective=objective)
    return None if solution is None else objective.reached(solution)


def _nearest(tables: Tables, asks: list[_Ask]) -> tuple[str, str] | None:
    """The first that can give way alone, as its setting and the nearest value in the terms of the target."""
    for ask in asks:
        value = _best_value(tables, _without(tables, ask), ask)
        if value is not None:
            return ask.setting, ask.nearest(value)
    return None


def _without(tables: Tables, ask: _Ask) -> list[Bounds]:
    """All bounds but one."""
    return [
        {key: bound for key, bound in demand.bounds.items() if (scenario, key) != (ask.scenario, ask.quantity.key)}
        for scenario, demand in enumerate(tables.demands)
    ]


def _is_idle(tables: Tables, ask: _Ask, solution: Solution, objective: Objective) -> bool:
    """Whether the solution stays the best without a bound."""
    if not ask.has_room(Objective(ask.quantity.key).reached(solution)):
        return False
    try:
        other = best(tables, _without(tables, ask), objective=objective)
    except PuzzleError:
        return False  # time was over
    assert other is not None, "a bound less excludes nothing"
    return same_sum(objective.reached(other), objective.reached(solution))


def _no_faster(asks: list[_Ask], solution: Solution) -> list[str]:
    """A line where sizes alone were asked for and the child is only smaller."""
    own, child = solution.parent, solution.predicted
    sizes = [ask.setting for ask in asks if ask.quantity.exact]
    if not sizes or any(ask.quantity.columns and not ask.quantity.exact for ask in asks) or not own["throughput_tok_s"]:
        return []
    faster = child["throughput_tok_s"] / own["throughput_tok_s"]
    if faster > 1 + _CLOSE:
        return []
    smaller = child["memory_bytes"] / max(own["memory_bytes"], 1)
    no_smaller = f" and no smaller in memory ({smaller:.2f}x)" if smaller > 1 - _CLOSE else ""
    return [
        f"{', '.join(sizes)}: met, but the child is predicted no faster than the parent ({faster:.2f}x){no_smaller}; "
        "bound throughput or latency if speed is what you want"
    ]
