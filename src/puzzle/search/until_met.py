"""A target asked for is a target met: the solution is timed on the engine before anything of it is built.

Predictions have errors of a few percent (docs/numbers.md). Where one is off by more than can be noise, the cost table
is fitted to the measurement and searched again; where the child falls short although its prediction was right, the
margin is widened by as much.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from puzzle.artefacts import Solution
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.quantities import SETTINGS
from puzzle.runs import Run, digest
from puzzle.search.fit import fitted
from puzzle.search.stage import search
from puzzle.search.tables import Tables
from puzzle.search.timing import BUSY, Timing, time_beside, time_bounds
from puzzle.stages import TIMING

_SEARCHES = 4
_CANDIDATES = 2
"""Better architectures of the pool that are timed before the search's own is taken."""
_RIGHT = 0.02
"""A prediction that is off by less counts as right."""


@dataclass(frozen=True, kw_only=True)
class Met:
    """The solution, and the tables in which the search found it."""

    solution: Solution
    tables: Tables
    timings: tuple[Timing, ...]
    """Of the main scenario, one for each search that was timed, in order; none if the target bounds sizes alone."""


def until_met(run: Run, parent: Parent, tables: Tables) -> Met:
    """Search, and again until the solution meets the target as measured, in all scenarios.

    If no search gets there, the last solution stands, with a warning.
    """
    first, solution, met = tables, search(run, tables), None
    history: list[Timing] = []
    missing = 0.0
    for left in reversed(range(_SEARCHES)):
        timings = _timings(run, parent, first, tables, solution)
        history += [timing for timing in timings[:1] if timing]
        known = [timing for timing in timings if timing]
        missing = max((timing.missing for timing in known), default=0.0)
        right = all(model.agrees(_RIGHT) for timing in known for model in timing.at_batch.values())
        if missing == 0 and (met is None or _is_better(solution, met[0], tables)):
            met = solution, tables
        if any(timing.unclear for timing in known):
            break
        if left == 0 or (missing == 0 and (right or _is_tight(known, tables.settings.margin))):
            break
        _log(run, known, missing)
        # What a fit does not mend, more room does.
        margin = tables.settings.margin + (missing if right or tables.costs is not first.costs else 0.0)
        changed = (tables if right else _fitted(tables, timings)).with_margin(margin)
        try:
            again = search(run, changed)
        except PuzzleError as error:
            run.log_warning(f"nothing has so much room ({error}); a solution above stands")
            break
        if missing == 0 and again.blocks == solution.blocks:
            break
        solution, tables = again, changed
    if met is None:
        run.log_warning(f"the target is still missed by {missing:.1%} as measured; raise search.margin")
        met = solution, tables
    return Met(solution=met[0], tables=met[1], timings=tuple(history))


def first_met(run: Run, parent: Parent, tables: Tables, solutions: Sequence[Solution]) -> Solution:
    """The first of the solutions that meets the target as measured; the last one, timed before, if no other does."""
    for solution in solutions[:-1][:_CANDIDATES]:
        timings = _timings(run, parent, tables, tables, solution)
        missing = max((timing.missing for timing in timings if timing), default=0.0)
        if missing == 0:
            return solution
        run.log(f"measured, a better architecture is {missing:.1%} short of the target; taking the next one")
    return solutions[-1]


def _timings(run: Run, parent: Parent, first: Tables, tables: Tables, solution: Solution) -> list[Timing | None]:
    """For each scenario; None where only sizes are bounded.

    Args:
        first: as they were measured: what an engine takes does not depend on a fit.
    """
    found: list[Timing | None] = []
    for original, demand, serving in zip(first.demands, tables.demands, solution.servings, strict=True):
        if not time_bounds(demand.asked):
            found.append(None)
            continue
        reference = parent.architecture.names, int(serving.parent["batch_size"])
        child = solution.blocks, serving.batch_size
        folder = run.open(
            TIMING,
            parent=parent,
            costs=digest(original.costs.to_json()),
            target=demand.target.model_dump(mode="json"),
            models=[reference, child],
        )
        if not folder.done:
            timing = time_beside(parent.config, original.costs, demand.target, reference, child)
            if timing.uncertainty > BUSY:
                run.log_warning(f"measured times are only sure to {timing.uncertainty:.0%}; close other programs")
            folder.commit(timing=asdict(timing))
        found.append(Timing.of(folder.facts["timing"]).predicted_by(demand.costs, reference, child))
    return found


def _fitted(tables: Tables, timings: Sequence[Timing | None]) -> Tables:
    """The tables with costs fitted to what was measured."""
    costs = [
        demand.costs if timing is None else fitted(demand.costs, timing.batch_size, [*timing.at_batch.values()])
        for demand, timing in zip(tables.demands, timings, strict=True)
    ]
    further = tuple(zip(costs[1:], (target for _, target in tables.further), strict=True))
    return replace(tables, costs=costs[0], further=further)


def _is_better(one: Solution, other: Solution, tables: Tables) -> bool:
    quantity = SETTINGS[tables.settings.objective]
    if quantity.key == "score":
        return one.score < other.score
    return quantity.better(one.predicted[quantity.key], other.predicted[quantity.key])


def _is_tight(timings: Sequence[Timing], margin: float) -> bool:
    """Whether the child takes all that the target allows, but for margin and noise: a fit would find nothing better."""
    return any(timing.utilisation * (1 + margin + max(_RIGHT, timing.uncertainty)) >= 1 for timing in timings)


def _log(run: Run, timings: Sequence[Timing], missing: float) -> None:
    error = max(error for timing in timings for model in timing.at_batch.values() for error in model.errors)
    uncertainty = max(timing.uncertainty for timing in timings)
    run.log(
        f"measured to {uncertainty:.1%}, this is {missing:.1%} short of the target, predictions are off by up to "
        f"{error:.1%}"
    )
