"""The same block in every layer, as when a whole model is narrowed (Minitron, arXiv 2407.14679)."""

from puzzle.search.baselines.base import Problem
from puzzle.search.exact import Candidate


def uniform(problem: Problem) -> Candidate | None:
    """Of the blocks that every layer has, the one with the lowest summed score within the bounds."""
    scores = problem.instance.scores
    names = [{row.block for row in scores.layer(layer)} for layer in range(scores.num_layers)]
    common = sorted(set.intersection(*names))
    return problem.best(lambda _: ([block] * scores.num_layers for block in common))
