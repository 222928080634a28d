"""What a person should know of a target that was met: bounds that decide nothing, and bounds that give no speed."""

from collections.abc import Sequence

from puzzle.artefacts import Bounds, Solution
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings
from puzzle.search.bounds import without
from puzzle.search.exact import Instance, Objective, best_architecture, same_sum
from puzzle.search.explain import Ask

_CLOSE = 0.01
"""Bounds with less room than this are taken for binding, and smaller differences in speed for none: predictions are not
that good.
"""
_SIZES = ("memory_bytes", "params", "weight_bytes")


def notes(
    instance: Instance,
    asked: Sequence[Ask],
    bounds: Bounds,
    settings: SearchSettings,
    objective: Objective,
    solution: Solution,
) -> tuple[str, ...]:
    """One line each."""
    found = [
        f"{ask}: decides nothing, the best architecture without it meets it too"
        for ask in asked
        if ask.place == 0 and ask.name != objective.name and _idle(instance, ask, bounds, settings, objective, solution)
    ]
    return (*found, *_no_faster(asked, solution))


def _idle(
    instance: Instance, ask: Ask, bounds: Bounds, settings: SearchSettings, objective: Objective, solution: Solution
) -> bool:
    """Whether the solution stays the best without a bound; not said of programs with links, which take long."""
    reached = solution.score if ask.name == "score" else solution.predicted[ask.name]
    if instance.pair_scores or instance.kinds is not None or not ask.has_room(reached, _CLOSE):
        return False
    try:
        other = best_architecture(instance, without(bounds, ask.name), settings, objective)
    except PuzzleError:
        return False  # time was over
    assert other is not None, "a bound less excludes nothing"
    return same_sum(objective.reached(other), objective.reached(solution))


def _no_faster(asked: Sequence[Ask], solution: Solution) -> list[str]:
    """A line where sizes alone were asked for and the child is only smaller."""
    own, child = solution.parent, solution.predicted
    sizes = [ask for ask in asked if ask.place == 0 and ask.name in _SIZES]
    if len(sizes) < sum(ask.place == 0 and ask.name != "score" for ask in asked) or not own["throughput_tok_s"]:
        return []
    faster = child["throughput_tok_s"] / own["throughput_tok_s"]
    if not sizes or faster > 1 + _CLOSE:
        return []
    smaller = child["memory_bytes"] / max(own["memory_bytes"], 1)
    no_smaller = f" and no smaller in memory ({smaller:.2f}x)" if smaller > 1 - _CLOSE else ""
    names = ", ".join(ask.setting for ask in sizes)
    return [
        f"{names}: met, but the child is predicted no faster than the parent ({faster:.2f}x){no_smaller}; "
        "bound throughput or latency if speed is what you want"
    ]
