"""The stage: the search's solution, and what whole architectures say of it and of others."""

from collections.abc import Sequence

from puzzle.artefacts import Correction, CostTable, ScoreTable, Solution
from puzzle.correct.finalists import halve
from puzzle.correct.ranks import kendall_tau, spearman
from puzzle.correct.steps import Steps
from puzzle.correct.whole import Blocks, TrueScore
from puzzle.data import TokenData
from puzzle.parents import Parent
from puzzle.runs import Run, digest, read_parsed, write_text


def correct(
    run: Run,
    true: TrueScore,
    parent: Parent,
    data: TokenData,
    scores: ScoreTable,
    costs: CostTable,
    solution: Solution,
    further: Sequence[CostTable] = (),
) -> Correction | None:
    """Look for a better architecture than `solution` within its bounds; kept as correction.json.

    None where `Recipe.corrected` says no: the solution stands.

    Args:
        further: costs in the recipe's further `scenarios`.
    """
    recipe = run.recipe
    if not recipe.corrected:
        return None
    identity = {
        "correct": recipe.correct.model_dump(mode="json"),
        "search": recipe.search.model_dump(mode="json"),
        "targets": [each.model_dump(mode="json") for each in (recipe.target, *(s.target for s in recipe.scenarios))],
        "distil": recipe.distil.model_dump(mode="json") if recipe.correct.finalists > 1 else None,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "solution": digest(solution.to_json()),
    }
    tables = [digest(table.to_json()) for table in (costs, *further)]
    inputs = (true.library.address, data.address, digest(scores.to_json()), *tables)
    stage = run.stage("correct", version=2, settings=identity, inputs=inputs)
    file = stage.path / "correction.json"
    if not stage.done:
        steps = Steps(run, scores, costs, solution, true, further)
        steps.take()
        ranked = steps.ranked()
        finalists = halve(run, parent, data, true.library, _entrants(ranked, recipe.correct.finalists))
        if finalists:
            ranked = _led_by(finalists[-1].blocks, ranked)
        pool = steps.pool()
        correction = Correction(
            score=recipe.search.score,
            tokens=true.tokens,
            judged=tuple(steps.judged),
            tau=kendall_tau(*pool),
            spearman=spearman(*pool),
            steps=tuple(steps.steps),
            finalists=tuple(finalists),
            ranked=tuple(ranked),
        )
        write_text(file, correction.to_json())
        stage.commit(judged=len(correction.judged))
    return read_parsed(file, Correction.from_json)


def _entrants(ranked: Sequence[Solution], count: int) -> list[Blocks]:
    """The best, and always the search's own, the last: what made others better before GKD may not last."""
    blocks = [solution.blocks for solution in ranked]
    return [*blocks[: max(0, min(count, len(blocks)) - 1)], blocks[-1]]


def _led_by(winner: Blocks, ranked: list[Solution]) -> list[Solution]:
    """The winner, and what was behind it if it turns out too slow: nothing, if it is the search's own."""
    place = [solution.blocks for solution in ranked].index(winner)
    return [ranked[place], *(solution for i, solution in enumerate(ranked) if i != place and place != len(ranked) - 1)]
