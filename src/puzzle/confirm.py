"""A target asked for is a target met: a solution is timed on the engine before anything of it is built.

Predictions have errors of a few percent (docs/numbers.md). Where the measured child falls short of the target, the
search is repeated with a margin that is wider by as much.
"""

from dataclasses import replace

from puzzle.artefacts import Bounds, CostTable, ScoreTable, Solution, Totals
from puzzle.blocks import Architecture, BlockVariant
from puzzle.costs import Times, time_architectures
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.runs import Run, digest
from puzzle.search import excesses, resolve_bounds, search

_SEARCHES = 4
_ROUNDS = 5
_NOISE = 0.01
"""The measured child must be better than asked by this share, so that the next measurement finds it so too."""


def confirmed_search(run: Run, parent: Parent, scores: ScoreTable, costs: CostTable) -> Solution:
    """The recipe's search, repeated until its solution meets the target as measured.

    If no search gets there, the last solution stands, with a warning.
    """
    inputs = (digest(scores.to_json()), digest(costs.to_json()))
    margin = run.recipe.search.margin
    solution = search(run, scores, costs, inputs, margin)
    for _ in range(_SEARCHES - 1):
        missing = _shortfall(run, parent, costs, solution)
        if missing == 0:
            return solution
        margin += missing
        run.log(f"measured, this is {missing:.1%} short of the target; searching again with a margin of {margin:.1%}")
        try:
            solution = search(run, scores, costs, inputs, margin)
        except PuzzleError as error:
            run.log_warning(f"nothing has so much room ({error}); the solution above stands")
            return solution
    if missing := _shortfall(run, parent, costs, solution):
        run.log_warning(f"the target is still missed by {missing:.1%} as measured; raise search.margin")
    return solution


def _shortfall(run: Run, parent: Parent, costs: CostTable, solution: Solution) -> float:
    """By what share measured times are above what the target allows; 0 if they are not, or if it bounds sizes alone."""
    if not _times_only(solution.asked).given():
        return 0.0
    batch_sizes = (int(solution.parent["batch_size"]), solution.batch_size)
    settings = {
        "target": run.recipe.target.model_dump(mode="json"),
        "blocks": list(solution.blocks),
        "batch_sizes": list(batch_sizes),
    }
    stage = run.stage("confirm", version=1, settings=settings, inputs=(digest(costs.to_json()),))
    if not stage.done:
        child = Architecture(tuple(BlockVariant.parse(name) for name in solution.blocks))
        models = tuple(zip((parent.architecture, child), batch_sizes, strict=True))
        times = time_architectures(parent.config, models, costs, _ROUNDS)
        measured = [_totals(costs, *model, each) for model, each in zip(models, times, strict=True)]
        asked = resolve_bounds(run.recipe.target, measured[0].as_dict(), margin=_NOISE)
        stage.commit(shortfall=max(excesses(measured[1], _times_only(asked)).values(), default=0.0))
    return float(stage.facts["shortfall"])


def _times_only(bounds: Bounds) -> Bounds:
    return replace(bounds, memory_bytes=None, params=None)


def _totals(costs: CostTable, architecture: Architecture, batch_size: int, times: Times) -> Totals:
    """Sizes as counted, times as measured."""
    predicted = costs.totals([block.name for block in architecture.blocks], batch_size)
    return replace(predicted, cost=replace(predicted.cost, prefill_ms=times.prefill_ms, decode_ms=times.decode_ms))
