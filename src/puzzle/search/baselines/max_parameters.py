"""As many parameters as the bounds allow, whatever the scores say (paper section F.2.3)."""

from dataclasses import replace

from puzzle.search.baselines.base import Problem
from puzzle.search.exact import Candidate


def max_parameters(problem: Problem) -> Candidate | None:
    """The optimum of the program that maximises the parameters."""
    costs = problem.instance.costs
    batch_size = costs.batch_sizes[0]  # parameters are the same at all
    parents = [costs.block(layer, block, batch_size).params for layer, block in enumerate(problem.parent)]
    scale = sum(parents) or 1
    return problem.optimum(
        replace(row, kl=(parents[row.layer] - costs.block(row.layer, row.block, batch_size).params) / scale)
        for row in problem.instance.scores.rows
    )
