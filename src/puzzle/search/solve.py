"""From tables and a target to the solution, or why there is none; pools of solutions, and the frontier."""

from dataclasses import replace

import numpy as np

from puzzle.artefacts import Bounds, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, SETTINGS
from puzzle.search.bounds import check_asked
from puzzle.search.exact import Objective, best, no_time
from puzzle.search.explain import explain, notes
from puzzle.search.tables import Tables

_DIVERSE_GAP = 1e-3
"""Relative gap of diverse solutions: finer than the scores' own noise, and many times faster than a tighter one."""


def solve(tables: Tables) -> Solution:
    """The best architecture that meets the target at one of the batch sizes: that of the lowest summed score.

    Raises:
        PuzzleError: a setting is contradictory, or the target is empty or cannot be met, with what can be reached.
    """
    solution = _answer(tables)
    return replace(solution, notes=notes(tables, solution, _objective(tables)))


def pool(tables: Tables, count: int, differing: int) -> list[Solution]:
    """The `count` best architectures, each of which differs from all others in at least `differing` layers.

    The best first; each is proven to be the best of those that differ enough from the ones found before it, for
    `differing` above 1 to a relative gap of 1e-3. Fewer where there are no more, or none is found in time.

    Raises:
        PuzzleError: as `solve`, or `differing` is not from 1 to the number of layers.
    """
    num_layers, objective = tables.scores.num_layers, _objective(tables)
    if not 1 <= differing <= num_layers:
        raise PuzzleError(f"pool: found differing {differing}; it must be from 1 to the {num_layers} layers")
    found = [_answer(tables)]
    gap = max(tables.settings.gap, _DIVERSE_GAP if differing > 1 else 0.0)
    while len(found) < count:
        others = [solution.blocks for solution in found]
        try:
            solution = best(tables, objective=objective, others=others, differing=differing, gap=gap)
        except PuzzleError:
            break  # time was over
        if solution is None:
            break
        found.append(solution)
    return sorted(found, key=objective.reached, reverse=objective.at_least)


def frontier(tables: Tables, key: str = "throughput_tok_s", points: int = 12) -> list[Solution]:
    """Exact solutions at `points` bounds on a quantity, from the parent's value to the best reachable by equal factors.

    Where that is 0, by equal steps. All other bounds are kept. Where these already force a value no better than the
    parent's, there is one point: the best reachable. Each solution's `bounds` say which bound it was found for.

    Raises:
        PuzzleError: the other bounds cannot be met.
    """
    quantity = QUANTITIES[key]
    tables = replace(tables, target=tables.target.model_copy(update={quantity.setting: None}))
    others, parent = [demand.bounds for demand in tables.demands], tables.demands[0].parent[key]
    extreme = best(tables, objective=Objective(key))
    if extreme is None:
        raise explain(tables)
    limit = extreme.predicted[key]
    if limit <= 0 and not quantity.exact:
        raise no_time(limit)
    spaced = np.geomspace if limit > 0 else np.linspace
    values = spaced(parent, limit, points).tolist() if quantity.better(limit, parent) else [limit]
    solutions: list[Solution] = []
    for value in values:
        bounds: list[Bounds] = [others[0] | {key: value}, *others[1:]]
        # A solution that meets the next, tighter bound is the best there too.
        still = solutions and quantity.better(solutions[-1].predicted[key], value)
        solution = solutions[-1] if still else best(tables, bounds)
        assert solution is not None, f"{key} {value} was reached before"
        solutions.append(replace(solution, asked=bounds[0], bounds=bounds[0]))
    return solutions


def _objective(tables: Tables) -> Objective:
    return Objective(SETTINGS[tables.settings.objective].key)


def _answer(tables: Tables) -> Solution:
    """The best, or why there is none."""
    check_asked([demand.target for demand in tables.demands], tables.settings)
    solution = best(tables, objective=_objective(tables))
    if solution is None:
        raise explain(tables)
    return solution
