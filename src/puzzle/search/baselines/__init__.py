"""What one does without the search: baselines on the same library, costs and bounds, each one small file."""

from collections.abc import Sequence

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.baselines.base import Baseline, Evaluator, Problem
from puzzle.search.baselines.depth import depth
from puzzle.search.baselines.evolutionary import evolutionary
from puzzle.search.baselines.greedy import greedy
from puzzle.search.baselines.max_parameters import max_parameters
from puzzle.search.baselines.noop_only import noop_only
from puzzle.search.baselines.random import random
from puzzle.search.baselines.uniform import uniform
from puzzle.search.bounds import resolve_bounds, without
from puzzle.search.exact import Instance
from puzzle.search.solve import Further, further_bounds, with_asked

BASELINES: dict[str, Baseline] = {
    "random": random,
    "greedy": greedy,
    "max-parameters": max_parameters,
    "uniform": uniform,
    "depth": depth,
    "noop-only": noop_only,
    "evolutionary": evolutionary,
}


def solve_baseline(
    name: str,
    scores: ScoreTable,
    costs: CostTable,
    target: TargetSettings,
    settings: SearchSettings,
    *,
    seed: int = 0,
    evaluate: Evaluator | None = None,
    evaluations: int = 256,
    influence: Sequence[float] | None = None,
    further: Further = (),
) -> Solution:
    """The architecture that baseline `name` finds within the target's bounds, checked against the raw tables, unproven.

    Args:
        seed: of `random` and `evolutionary`; the others draw nothing.
        evaluate: what `evolutionary` minimises, such as the true KL; without it the summed score.
        evaluations: how many architectures `evolutionary` may evaluate.
        influence: of each layer, the order in which `depth` drops them; without it the score of an empty layer.
        further: other scenarios that the same architecture must serve, as in `solve`.

    Raises:
        PuzzleError: there is no such baseline, or it finds nothing within the bounds; the search itself still may.
    """
    if name not in BASELINES:
        raise PuzzleError(f"baseline {name!r} is unknown; use one of {', '.join(BASELINES)}")
    others = further_bounds(scores, further, settings)
    instance = Instance.of(scores, costs, settings.score, constraints=settings, further=others)
    bounds = resolve_bounds(target, instance.parent, settings.margin)
    if not any(without(its, "score") for its in (bounds, *(part.bounds for part in instance.further))):
        raise PuzzleError("target: no cost is bounded; a baseline needs that, for example `throughput: 2x`")
    problem = Problem(
        instance=instance,
        bounds=bounds,
        settings=settings,
        seed=seed,
        evaluate=evaluate or (lambda pool: [instance.total(blocks) for blocks in pool]),
        evaluations=evaluations,
        influence=influence,
    )
    found = BASELINES[name](problem)
    if found is None:
        raise PuzzleError(f"baseline {name}: it finds nothing within the target; loosen the target or take another")
    solution = found.solution(instance.parent, bounds, None, instance.further)
    return with_asked(solution, [target, *(its for _, its in further)])


__all__ = ["BASELINES", "Baseline", "Evaluator", "Problem", "solve_baseline"]
