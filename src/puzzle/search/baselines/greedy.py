"""A budget for each layer, spent one after another (paper section F.2.2)."""

from collections.abc import Iterator, Sequence

import numpy as np

from puzzle.search.baselines.base import Combination, Problem
from puzzle.search.exact import Candidate


def greedy(problem: Problem) -> Candidate | None:
    """Each bound is split equally over the layers; the easiest layer, of lowest mean score, chooses first.

    Each takes the block of lowest score within its budget, and what it leaves over is the next one's. Where nothing
    fits, it takes what overdraws least, and the next ones have less.
    """

    def propose(combination: Combination) -> Iterator[Sequence[str]]:
        choices, program = combination[0], problem.program(combination)
        limits = np.array([row.limit for row in program.rows])
        terms = np.stack([row.terms for row in program.rows], axis=1)
        means = [choices.scores[choices.layers == layer].mean() for layer in range(choices.num_layers)]
        shares = np.bincount(choices.groups) / len(choices.groups)  # layers that are to be equal choose as one
        chosen, budget = np.zeros(choices.num_layers, dtype=np.int64), np.zeros(len(limits))
        for layer in np.argsort(means, kind="stable"):
            budget += limits * shares[layer]
            entries = np.flatnonzero(program.layers == layer)
            overdrawn = np.maximum(terms[entries] - budget, 0).max(axis=1)
            entry = entries[np.lexsort((program.objective[entries], overdrawn))[0]]
            budget -= terms[entry]
            chosen[layer] = program.entries[entry]
        yield choices.architecture(chosen)

    return problem.best(propose)
