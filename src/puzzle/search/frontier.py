"""What each step of one quantity costs in score: the exact frontier."""

from dataclasses import replace

import numpy as np

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.quantities import QUANTITIES
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import no_time, resolve_bounds, without
from puzzle.search.exact import Instance, best_architecture
from puzzle.search.explain import best_value, explain
from puzzle.search.solve import Further, further_bounds


def frontier(
    scores: ScoreTable,
    costs: CostTable,
    target: TargetSettings,
    settings: SearchSettings,
    quantity: str = "throughput_tok_s",
    points: int = 12,
    *,
    further: Further = (),
) -> list[Solution]:
    """Exact solutions at `points` bounds on `quantity`, from the parent's value to the best reachable by equal factors.

    Where that is 0, by equal steps. The target's other bounds are kept, and those of further scenarios. Where these
    already force a value no better than the parent's, there is one point: the best reachable. Each solution's `bounds`
    say which bound it was found for.

    Raises:
        PuzzleError: the other bounds cannot be met.
    """
    instance = Instance.of(
        scores, costs, settings.score, constraints=settings, further=further_bounds(scores, further, settings)
    )
    others = without(resolve_bounds(target, instance.parent, settings.margin), quantity)
    best, parent = best_value(instance, quantity, others, settings), instance.parent[quantity]
    if best is None:
        unbounded = target.model_copy(update={QUANTITIES[quantity].setting: None})
        raise explain(instance, [unbounded, *(its for _, its in further)], others, settings)
    if best <= 0 and not QUANTITIES[quantity].exact:
        raise no_time(best)
    better = QUANTITIES[quantity].better(best, parent)
    spaced = np.geomspace if best > 0 else np.linspace
    values = spaced(parent, best, points).tolist() if better else [best]
    solutions: list[Solution] = []
    for value in values:
        bounds = others | {quantity: value}
        solution = _still_best(solutions, quantity, value) or best_architecture(instance, bounds, settings)
        assert solution is not None, f"{quantity} {value} was reached before"
        solutions.append(replace(solution, asked=bounds, bounds=bounds))
    return solutions


def _still_best(solutions: list[Solution], quantity: str, value: float) -> Solution | None:
    """The last solution, where it meets the tighter bound too: then nothing else can be better there."""
    if solutions and QUANTITIES[quantity].better(solutions[-1].predicted[quantity], value):
        return solutions[-1]
    return None
