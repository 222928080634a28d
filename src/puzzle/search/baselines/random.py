"""A random architecture within the bounds, whatever the scores say (paper section F.2.4)."""

from dataclasses import replace

import numpy as np

from puzzle.search.baselines.base import Problem
from puzzle.search.exact import Candidate


def random(problem: Problem) -> Candidate | None:
    """The optimum of the program over random scores: always within the bounds, however tight, where anything is.

    The scores are Gumbel noise, for which every architecture is equally likely where no bound binds.
    """
    rows = problem.instance.scores.rows
    noise = np.random.default_rng(problem.seed).gumbel(size=len(rows)).tolist()
    own = {row.layer: value for row, value in zip(rows, noise, strict=True) if row.block == problem.parent[row.layer]}
    return problem.optimum(replace(row, kl=own[row.layer] - value) for row, value in zip(rows, noise, strict=True))
