"""Whole layers dropped, the least missed first, and nothing else changed (ShortGPT, arXiv 2403.03853)."""

from collections.abc import Sequence

from puzzle.search.baselines.base import Problem, is_noop
from puzzle.search.exact import Candidate


def depth(problem: Problem) -> Candidate | None:
    """The first few layers by block influence, or by the score of the layer as a no-op; as few as it takes."""
    scores, parent = problem.instance.scores, problem.parent
    empty = {row.layer: row for row in scores.rows if is_noop(row.block)}
    influence = problem.influence or {
        layer: scores.value(layer, row.block, problem.instance.score) for layer, row in empty.items()
    }
    rising = sorted(empty, key=lambda layer: influence[layer])

    def without(dropped: Sequence[int]) -> list[str]:
        return [empty[layer].block if layer in dropped else block for layer, block in enumerate(parent)]

    return problem.best(lambda _: (without(rising[:count]) for count in range(len(rising) + 1)))
