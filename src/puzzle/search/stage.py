"""The stages in a run folder: the search until its solution meets the target as measured, and its pool as wholes.

A target asked for is a target met: the solution is timed on the engine before anything of it is built. Predictions have
errors of a few percent (docs/numbers.md). Where the child falls short by more than noise, or is faster than it need be,
it is searched again: with a cost table fitted to the measurement if the prediction was off, and otherwise with a margin
that is wider by as much.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from puzzle.artefacts import Correction, Solution, WholeScore
from puzzle.costs import Sample
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.quantities import QUANTITIES
from puzzle.runs import Run, digest, read_parsed, write_text
from puzzle.search.solve import pool, solve
from puzzle.search.tables import Tables
from puzzle.search.timing import BUSY, Timing, fitted, time_beside, time_bounds
from puzzle.stages import CORRECT, SEARCH, TIMING

MIN_IMPROVEMENT = 0.03
"""Share by which another must beat the search's own: less is gone on other text (benchmarks/search_quality.md)."""
_RIGHT = 0.02
"""A prediction that is off by less counts as right."""


def search(run: Run, tables: Tables, why: str = "") -> Solution:
    """The best architecture of the tables, kept as solution.json; `why` it is searched again is logged."""
    folder = run.open(SEARCH, margin=tables.settings.margin, **_addresses(tables))
    path = folder.path / "solution.json"
    if folder.done:
        return read_parsed(path, Solution.from_json)
    if why:
        run.log(f"search: again, {why}")
    solution = solve(tables)
    write_text(path, solution.to_json())
    folder.commit()
    run.log(f"search: sum of {tables.settings.score} {solution.score:.4g}, {solution.proof}")
    for demand, serving in zip(tables.demands, solution.servings, strict=True):
        said = []
        for key in ("throughput_tok_s", "memory_bytes"):
            value, quantity = serving.predicted[key], QUANTITIES[key]
            said.append(f"{quantity.label} {quantity.text(value)} ({value / serving.parent[key]:.2f}x the parent's)")
        where = f"in {demand.costs.scenario}, at batch size {serving.batch_size}"
        run.log(f"search: {where}; predicted {', '.join(said)}")
    return solution


def correct(
    run: Run,
    tables: Tables,
    solution: Solution,
    evaluate: Callable[[Sequence[tuple[str, ...]]], Sequence[WholeScore]],
    library: Library,
    data: TokenData,
) -> Correction:
    """The search's best solutions ranked by their scores as whole architectures, kept as correction.json.

    Another one comes before the search's own only if it is better by `MIN_IMPROVEMENT`.

    Args:
        tables: those in which `solution` was found.
        evaluate: scores architectures of `library` on the end of the scoring text of `data`.
    """
    folder = run.open(CORRECT, margin=tables.settings.margin, library=library, data=data, **_addresses(tables))
    file = folder.path / "correction.json"
    if folder.done:
        return read_parsed(file, Correction.from_json)
    settings = run.recipe.correct
    found = pool(tables, settings.pool, min(settings.differing, tables.scores.num_layers)) if settings.pool else []
    # The best of a pool of diverse solutions may be another one of the same score.
    solutions = [solution, *(replace(each, proof=None) for each in found if each.blocks != solution.blocks)]
    wholes = evaluate([each.blocks for each in solutions])
    values = [whole.value(tables.settings.score) for whole in wholes]
    enough = values[0] - MIN_IMPROVEMENT * abs(values[0]) if math.isfinite(values[0]) else values[0]
    better = sorted((place for place, value in enumerate(values) if value < enough), key=lambda place: values[place])
    ranked = tuple(solutions[place] for place in [*better, 0])
    correction = Correction(evaluated=tuple(wholes), ranked=ranked)
    told = f"correct: as a whole the search's architecture has a {tables.settings.score} of {values[0]:.4g}"
    stays = "" if better else f"; none is better by {MIN_IMPROVEMENT:.0%}, so it stays"
    run.log(f"{told}, the best of {len(values)} {min(values):.4g}{stays}")
    write_text(file, correction.to_json())
    folder.commit()
    return correction


def _addresses(tables: Tables) -> dict[str, object]:
    """Of the tables, as inputs of a stage."""
    costs = [digest(demand.costs.to_json()) for demand in tables.demands]
    return {"scores": digest(tables.scores.to_json()), "costs": costs}


class Met(NamedTuple):
    """The solution, and the tables in which the search found it."""

    solution: Solution
    tables: Tables
    timings: tuple[Timing, ...]
    """Of the main scenario, one for each search that was timed, in order; none if the target bounds sizes alone."""


def until_met(run: Run, parent: Parent, tables: Tables) -> Met:
    """Search, and again until the solution meets the target as far as can be measured, in all scenarios.

    If four searches do not get there, the last solution stands, with a warning.
    """
    first, solution, met = tables, search(run, tables), None
    history: list[Timing] = []
    for left in reversed(range(4)):
        timings = _timings(run, parent, tables, solution)
        known = list(timings.values())
        history += [timings[0]] if 0 in timings else []
        over = max((timing.utilisation - 1 for timing in known), default=0.0)
        short = any(timing.short for timing in known)
        errors = [(time.error, time.uncertainty) for timing in known for time in timing.times]
        right = all(error <= max(_RIGHT, uncertainty) for error, uncertainty in errors)
        value = tables.objective.minimised
        if not short and (met is None or value(solution) < value(met[0])):
            met = solution, tables, over
        margin = tables.settings.margin
        # The child takes all that the target allows, but for margin and noise: a fit would find nothing better.
        tight = any(each.utilisation * (1 + margin + max(_RIGHT, each.uncertainty)) >= 1 for each in known)
        if left == 0 or (not short and (right or tight or tables is not first)):
            break
        # What a fit does not mend, more room does.
        if right or tables.costs is not first.costs:
            margin += max(timing.missing for timing in known)
        changed = replace(tables, settings=tables.settings.model_copy(update={"margin": margin}))
        why = f"with a margin of {margin:.1%}"
        if not right:
            why = f"with costs fitted to these times, which predictions miss by up to {max(errors)[0]:.1%}"
            costs = [
                fitted(demand.costs, serving.batch_size, timings[place].times) if place in timings else demand.costs
                for place, (demand, serving) in enumerate(zip(tables.demands, solution.servings, strict=True))
            ]
            further = [(its, target) for its, (_, target) in zip(costs[1:], tables.further, strict=True)]
            changed = replace(changed, costs=costs[0], further=further)
        try:
            again = search(run, changed, why)
        except PuzzleError as error:
            run.log_warning(f"nothing has so much room ({error}); a solution above stands")
            break
        if not short and again.blocks == solution.blocks:
            break
        solution, tables = again, changed
    solution, tables, over = met or (solution, tables, over)
    if over > 0:
        run.log_warning(f"the target is still missed by {over:.1%} as measured; raise search.margin")
    return Met(solution, tables, tuple(history))


def first_met(run: Run, parent: Parent, tables: Tables, solutions: Sequence[Solution]) -> Solution:
    """The first of the solutions that is not short of the target; the last one, timed before, if no other is not.

    Two others are timed at most.
    """
    for solution in solutions[:-1][:2]:
        timings = _timings(run, parent, tables, solution)
        if not any(timing.short for timing in timings.values()):
            return solution
    return solutions[-1]


def _timings(run: Run, parent: Parent, tables: Tables, solution: Solution) -> dict[int, Timing]:
    """By scenario, of those where a speed or a time is bounded."""
    found = {}
    for place, (demand, serving) in enumerate(zip(tables.demands, solution.servings, strict=True)):
        if not time_bounds(demand.asked):
            continue
        scenario, target = demand.costs.scenario, demand.target
        models = (parent.architecture.names, int(serving.parent["batch_size"])), (solution.blocks, serving.batch_size)
        predicted = [demand.costs.totals(*model) for model in models]
        folder = run.open(
            TIMING,
            parent=parent,
            scenario=scenario.identity,
            environment=demand.costs.environment,
            target=target.model_dump(mode="json"),
            models=models,
        )
        if folder.done:
            samples = [[Sample(*each) for each in rounds] for rounds in folder.facts["samples"]]
            found[place] = Timing(target, predicted, samples)
        else:
            found[place] = timing = time_beside(parent.config, scenario, target, models, predicted)
            sure = f"sure to {timing.uncertainty:.1%}, more than 100% misses it"
            run.log(f"timing: as measured, this takes {timing.utilisation:.1%} of what the target allows ({sure})")
            if timing.uncertainty > BUSY:
                run.log_warning(f"measured times are only sure to {timing.uncertainty:.0%}; close other programs")
            folder.commit(samples=timing.samples)
    return found
