"""A target asked for is a target met: the solution is timed on the engine before anything of it is built.

Predictions have errors of a few percent (docs/numbers.md). Where one is off by more than can be noise, the cost table
is fitted to the measurement and searched again; where the child falls short although its prediction was right, the
margin is widened by as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle.artefacts import Solution
from puzzle.costs import Sample
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.quantities import SETTINGS
from puzzle.runs import Run, digest
from puzzle.search.exact import Objective
from puzzle.search.stage import search
from puzzle.search.tables import Tables
from puzzle.search.timing import BUSY, Timing, fitted, time_beside, time_bounds
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
    objective = Objective(SETTINGS[tables.settings.objective].key)
    first, solution, met = tables, search(run, tables), None
    history: list[Timing] = []
    missing = 0.0
    for left in reversed(range(_SEARCHES)):
        timings = _timings(run, parent, first, tables, solution)
        known = list(timings.values())
        history += [timings[0]] if 0 in timings else []
        missing = max((timing.missing for timing in known), default=0.0)
        errors = [(time.error, time.uncertainty) for timing in known for time in timing.times]
        right = all(error <= max(_RIGHT, uncertainty) for error, uncertainty in errors)
        if missing == 0 and (met is None or objective.minimised(solution) < objective.minimised(met[0])):
            met = solution, tables
        margin = tables.settings.margin
        # The child takes all that the target allows, but for margin and noise: a fit would find nothing better.
        tight = any(each.utilisation * (1 + margin + max(_RIGHT, each.uncertainty)) >= 1 for each in known)
        unclear = any(each.missing > 0 and each.uncertainty > BUSY and not each.clear for each in known)
        if left == 0 or unclear or (missing == 0 and (right or tight)):
            break
        run.log(
            f"measured to {max(each.uncertainty for each in known):.1%}, this is {missing:.1%} short of the target, "
            f"predictions are off by up to {max(error for error, _ in errors):.1%}"
        )
        # What a fit does not mend, more room does.
        margin += missing if right or tables.costs is not first.costs else 0.0
        changed = replace(tables, settings=tables.settings.model_copy(update={"margin": margin}))
        if not right:
            costs = [
                fitted(demand.costs, serving.batch_size, timings[place].times) if place in timings else demand.costs
                for place, (demand, serving) in enumerate(zip(tables.demands, solution.servings, strict=True))
            ]
            targets = [target for _, target in tables.further]
            changed = replace(changed, costs=costs[0], further=[*zip(costs[1:], targets, strict=True)])
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
        missing = max((timing.missing for timing in timings.values()), default=0.0)
        if missing == 0:
            return solution
        run.log(f"measured, a better architecture is {missing:.1%} short of the target; taking the next one")
    return solutions[-1]


def _timings(run: Run, parent: Parent, first: Tables, tables: Tables, solution: Solution) -> dict[int, Timing]:
    """By scenario, of those where a speed or a time is bounded.

    Args:
        first: as they were measured: what an engine takes does not depend on a fit.
    """
    found = {}
    for place, (demand, serving) in enumerate(zip(tables.demands, solution.servings, strict=True)):
        if not time_bounds(demand.asked):
            continue
        models = (parent.architecture.names, int(serving.parent["batch_size"])), (solution.blocks, serving.batch_size)
        reference, child = (demand.costs.totals(*model) for model in models)
        folder = run.open(
            TIMING,
            parent=parent,
            costs=digest(first.demands[place].costs.to_json()),
            target=demand.target.model_dump(mode="json"),
            models=models,
        )
        if folder.done:
            samples = [[Sample(*each) for each in rounds] for rounds in folder.facts["samples"]]
            found[place] = Timing(demand.target, (reference, child), samples)
        else:
            pair = (models[0][0], reference), (models[1][0], child)
            found[place] = timing = time_beside(parent.config, demand.costs.scenario, demand.target, *pair)
            if timing.uncertainty > BUSY:
                run.log_warning(f"measured times are only sure to {timing.uncertainty:.0%}; close other programs")
            folder.commit(samples=timing.samples)
    return found
