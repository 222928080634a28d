"""Why a target cannot be met: what can be reached, and the nearest target that can be met."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from puzzle.artefacts import Bounds
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, TIME_TOLERANCE
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import without
from puzzle.search.exact import Instance, Objective, best_architecture
from puzzle.units import Amount

_TIMES = ((1, "ms"),)
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_UNITS: dict[str, Sequence[tuple[float, str]]] = {
    "throughput_tok_s": ((1, " tok/s"),),
    "request_ms": _TIMES,
    "decode_ms": _TIMES,
    "prefill_ms": _TIMES,
    "memory_bytes": _SIZES,
    "params": ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")),
    "weight_bytes": _SIZES,
    "score": ((1, ""),),
}
"""As the recipe reads them, the largest first."""
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One bound of a target, in words."""

    name: str
    """`score`, or one of `QUANTITIES`."""
    place: int
    """In which scenario: the main one, or the further ones from 1."""
    amount: Amount
    parent: float
    margin: float

    @property
    def setting(self) -> str:
        target = f"scenarios[{self.place - 1}].target" if self.place else "target"
        return f"{target}.{QUANTITIES[self.name].setting}"

    @property
    def at_least(self) -> bool:
        return QUANTITIES[self.name].at_least

    def __str__(self) -> str:
        asked = self.amount.resolve(self.parent)
        absolute = self.absolute(asked, ROUND_HALF_EVEN)
        return f"{self.setting}: " + (f"{self.amount.text} ({absolute})" if self.amount.relative else absolute)

    def meets(self, value: float) -> bool:
        """Whether a predicted value is within the bound, the margin kept."""
        bound = self.amount.resolve(self.parent)
        if self.at_least:
            return self.promised(value) * (1 + TIME_TOLERANCE) >= bound
        exact = QUANTITIES[self.name].exact
        return self.promised(value) <= bound * (1 if exact else 1 + TIME_TOLERANCE)

    def has_room(self, value: float, share: float) -> bool:
        """Whether a predicted value is better than the bound by more than a share of it."""
        bound = self.amount.resolve(self.parent)
        ratio = self.promised(value) / bound
        return ratio > 1 + share if self.at_least else ratio < 1 - share

    def promised(self, value: float) -> float:
        """What the target may ask for where `value` is predicted."""
        return QUANTITIES[self.name].without_margin(value, self.margin)

    def range(self, best: float) -> str:
        """`2480 tok/s (parent) to 9120 tok/s (3.68x)`, the best with the margin taken off."""
        best = self.promised(best)
        start, end = self.absolute(self.parent, ROUND_HALF_EVEN), self.absolute(best, self._reachable_side)
        times = f" ({_digits(best / self.parent, self._reachable_side)}x)" if self.parent else ""
        return f"{start} (parent) to {end}{times}"

    def nearest(self, best: float) -> str:
        """The best in the terms of the target (`3.6x`, `28%`, `24GB`), rounded to the side that can be met."""
        best = self.promised(best)
        if not self.amount.relative:
            return self.absolute(best, self._reachable_side)
        if self.amount.text.strip().endswith("%"):
            return _digits(100 * best / self.parent, self._reachable_side) + "%"
        return _digits(best / self.parent, self._reachable_side) + "x"

    def absolute(self, value: float, rounding: str) -> str:
        size, unit = next((item for item in _UNITS[self.name] if value >= item[0]), _UNITS[self.name][-1])
        return _digits(value / size, rounding) + unit

    @property
    def _reachable_side(self) -> str:
        return ROUND_FLOOR if self.at_least else ROUND_CEILING


def asks(instance: Instance, targets: Sequence[TargetSettings], margin: float) -> list[Ask]:
    """The bounds of the main target and of those of further scenarios, each in the order in which they give way."""
    parents = [instance.parent, *(part.parent for part in instance.further)]
    names = {name: quantity.setting for name, quantity in QUANTITIES.items()}
    found = []
    for place, (target, parent) in enumerate(zip(targets, parents, strict=True)):
        for name, setting in names.items():
            amount = getattr(target, setting)
            if amount is not None:
                found.append(Ask(name=name, place=place, amount=amount, parent=parent.get(name, 0.0), margin=margin))
    return found


def explain(
    instance: Instance, targets: Sequence[TargetSettings], bounds: Bounds, settings: SearchSettings
) -> PuzzleError:
    """One line for a target that no architecture meets.

    Names the bounds that are out of reach, each with the range from the parent's value to the best of any architecture
    that the search may choose. If each alone is within reach, it says so. Where one bound is to blame, or any
    one could give way, the line ends with the nearest value of it that can be met with the others kept.

    Args:
        targets: the main one and those of further scenarios.
        bounds: of the main one.
    """
    asked = asks(instance, targets, settings.margin)
    free = _without_bounds(instance)
    best = {ask: best_value(free, ask.name, Bounds(), settings, ask.place) for ask in asked}
    beyond = [ask for ask, value in best.items() if value is not None and not ask.meets(value)]
    if not asked or None in best.values():
        return PuzzleError(
            f"search.kinds: {settings.kinds} are not enough for what search.fix, search.forbid and search.equal leave; "
            "raise it or loosen these"
        )
    ranges = [f"{ask} asked; reachable {ask.range(value)}" for ask in beyond if (value := best[ask]) is not None]
    if len(beyond) > 1:
        return PuzzleError(f"{'; '.join(ranges)}; set each within its range")
    nearest = _nearest(instance, beyond or asked, bounds, settings)
    kept = " with the other bounds kept" if len(asked) > 1 else ""
    if beyond:
        end = f"nearest{kept}: {nearest[1]}" if nearest else "nothing was found within the other bounds either"
        return PuzzleError(f"{ranges[0]}; {end}")
    end = f"nearest{kept}: {': '.join(nearest)}" if nearest else "giving way in one alone is not enough; loosen several"
    return PuzzleError(f"{', '.join(map(str, asked))}: each alone can be met, together they cannot; {end}")


def best_value(instance: Instance, name: str, bounds: Bounds, settings: SearchSettings, place: int = 0) -> float | None:
    """The best value of a quantity or the score within `bounds`, in scenario `place`; None if nothing is within them.

    Raises:
        PuzzleError: the time limit was over before anything was found or excluded.
    """
    objective = Objective(name, place)
    best = best_architecture(instance, bounds, settings, objective)
    return None if best is None else objective.reached(best)


def _nearest(
    instance: Instance, asked: Sequence[Ask], bounds: Bounds, settings: SearchSettings
) -> tuple[str, str] | None:
    """The first that can give way alone, as its setting and the nearest value in the terms of the target."""
    for ask in asked:
        best = best_value(*_loosened(instance, bounds, ask), settings, ask.place)
        if best is not None:
            return ask.setting, ask.nearest(best)
    return None


def _loosened(instance: Instance, bounds: Bounds, ask: Ask) -> tuple[Instance, str, Bounds]:
    """Without one bound."""
    if ask.place == 0:
        return instance, ask.name, without(bounds, ask.name)
    further = list(instance.further)
    part = further[ask.place - 1]
    further[ask.place - 1] = replace(part, bounds=without(part.bounds, ask.name))
    return replace(instance, further=further), ask.name, bounds


def _without_bounds(instance: Instance) -> Instance:
    return replace(instance, further=[replace(part, bounds=Bounds()) for part in instance.further])


def _digits(value: float, rounding: str) -> str:
    """Without an exponent, which no one writes into a recipe."""
    exact = Decimal(str(value))
    step = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    return f"{exact.quantize(step, rounding).normalize():f}"
