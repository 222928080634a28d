"""Why a target cannot be met: what can be reached, and the nearest target that can be met."""

from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from puzzle.artefacts import Bounds
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import QUANTITIES, Quantity
from puzzle.search.exact import Instance, best_value
from puzzle.search.problem import largest_sum
from puzzle.units import Amount

_UNITS: dict[str, Sequence[tuple[float, str]]] = {
    "throughput_tok_s": ((1, " tok/s"),),
    "request_ms": ((1, "ms"),),
    "decode_ms": ((1, "ms"),),
    "prefill_ms": ((1, "ms"),),
    "memory_bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "params": ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")),
}
"""As the recipe reads them, the largest first."""
_DIGITS = 4


def explain(instance: Instance, target: TargetSettings, bounds: Bounds, settings: SearchSettings) -> PuzzleError:
    """One line for a target that no architecture meets.

    Names the bounds that are out of reach, each with the range from the parent's value to the best of any architecture
    (exact: layers choose independently). If each alone is within reach, it says so. Where one bound is to blame, or any
    one could give way, the line ends with the nearest value of it that can be met with the others kept.
    """
    given = bounds.given()
    names = [name for name in QUANTITIES if name in given]
    asked = {name: _asked(QUANTITIES[name], target, given[name], settings.margin) for name in names}
    beyond = [name for name in names if not _within_reach(instance, name, given[name])]
    ranges = [f"{asked[name]} asked; reachable {_range(instance, name, settings.margin)}" for name in beyond]
    if len(beyond) > 1:
        return PuzzleError(f"{'; '.join(ranges)}; set each within its range")
    nearest = _nearest(instance, beyond or names, target, bounds, settings)
    kept = " with the other bounds kept" if len(names) > 1 else ""
    if beyond:
        end = f"nearest{kept}: {nearest[1]}" if nearest else "nothing was found within the other bounds either"
        return PuzzleError(f"{ranges[0]}; {end}")
    end = f"nearest{kept}: {': '.join(nearest)}" if nearest else "giving way in one alone is not enough; loosen several"
    return PuzzleError(f"{', '.join(asked.values())}: each alone can be met, together they cannot; {end}")


def _within_reach(instance: Instance, name: str, bound: float) -> bool:
    return any(choices.cheapest(name) <= largest_sum(choices, name, bound) for choices in instance.choices)


def _range(instance: Instance, name: str, margin: float) -> str:
    """`2480 tok/s (parent) to 9120 tok/s (3.68x)`, the best with the margin taken off."""
    quantity, parent = QUANTITIES[name], instance.parent[name]
    best = quantity.best(
        [
            quantity.convert(choices.cheapest(name), choices.batch_size, choices.generated_tokens)
            for choices in instance.choices
        ]
    )
    assert best is not None, "no batch sizes"
    best = quantity.promised(best, margin)
    side = _reachable_side(quantity)
    start, end = _absolute(name, parent, ROUND_HALF_EVEN), _absolute(name, best, side)
    return f"{start} (parent) to {end} ({_digits(best / parent, side)}x)"


def _nearest(
    instance: Instance, names: Sequence[str], target: TargetSettings, bounds: Bounds, settings: SearchSettings
) -> tuple[str, str] | None:
    """The first of `names` that can give way alone, as its setting and the nearest value in the terms of the target."""
    for name in names:
        best = best_value(instance, name, replace(bounds, **{name: None}), settings)
        if best is not None:
            setting, nearest = QUANTITIES[name].setting, QUANTITIES[name].promised(best, settings.margin)
            return f"target.{setting}", _in_terms_of(getattr(target, setting), name, nearest, instance.parent[name])
    return None


def _asked(quantity: Quantity, target: TargetSettings, bound: float, margin: float) -> str:
    amount: Amount = getattr(target, quantity.setting)
    absolute = _absolute(quantity.name, quantity.promised(bound, margin), ROUND_HALF_EVEN)
    return f"target.{quantity.setting}: " + (f"{amount.text} ({absolute})" if amount.relative else absolute)


def _in_terms_of(amount: Amount, name: str, value: float, parent: float) -> str:
    """`value` as the target put it (`3.6x`, `28%`, `24GB`), rounded to the side that can be met."""
    side = _reachable_side(QUANTITIES[name])
    if not amount.relative:
        return _absolute(name, value, side)
    if amount.text.strip().endswith("%"):
        return _digits(100 * value / parent, side) + "%"
    return _digits(value / parent, side) + "x"


def _reachable_side(quantity: Quantity) -> str:
    return ROUND_FLOOR if quantity.at_least else ROUND_CEILING


def _absolute(name: str, value: float, rounding: str) -> str:
    size, unit = next((item for item in _UNITS[name] if value >= item[0]), _UNITS[name][-1])
    return _digits(value / size, rounding) + unit


def _digits(value: float, rounding: str) -> str:
    """Without an exponent, which no one writes into a recipe."""
    exact = Decimal(str(value))
    step = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    return f"{exact.quantize(step, rounding).normalize():f}"
