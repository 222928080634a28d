"""Evolution by level switches, judged on the whole model (EvoPress, arXiv 2410.14649)."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle.search.baselines.base import Combination, Problem
from puzzle.search.baselines.random import random
from puzzle.search.exact import Candidate

_OFFSPRING = 8
"""A generation, of which the best lives on if it beats its parent."""
_TRIES = 20
"""Mutations tried for each of them that is within the bounds and new."""
_SWITCHES = 3
"""Most layers that one mutation makes richer."""

_Levels = NDArray[np.int64]
"""[L]: which of its blocks each layer has, counted from the cheapest; layers that are to be equal are one."""


def evolutionary(problem: Problem) -> Candidate | None:
    """The best of `problem.evaluations` architectures, at the batch sizes of the random one from which they descend.

    A mutation makes a few layers richer and others poorer, by any number of levels, until the bounds are met again.
    The levels of a layer are those of its blocks that no other one dominates in score and bounded costs.
    """
    drawn = random(problem)
    if drawn is None:
        return None
    sizes = [totals.batch_size for totals in (drawn.totals, *drawn.further)]
    (combination,) = (each for each in problem.combinations() if [choices.batch_size for choices in each] == sizes)
    batch_size, mutations = sizes[0], _Mutations(problem, combination, np.random.default_rng(problem.seed))
    levels = mutations.levels_of(drawn.blocks)
    best = problem.candidate(mutations.blocks(levels), batch_size)
    assert best is not None, "what dominates a block within the bounds is within them too"
    seen, left = {best.blocks}, problem.evaluations - 1
    value = problem.evaluate([best.blocks])[0]
    while left > 0:
        offspring: list[tuple[_Levels, Candidate]] = []
        for mutated in mutations.of(levels, min(_OFFSPRING, left) * _TRIES):
            found = problem.candidate(mutations.blocks(mutated), batch_size)
            if found and found.blocks not in seen:
                seen.add(found.blocks)
                offspring.append((mutated, found))
            if len(offspring) == min(_OFFSPRING, left):
                break
        if not offspring:
            break
        left -= len(offspring)
        values = problem.evaluate([candidate.blocks for _, candidate in offspring])
        place = int(np.argmin(values))
        if values[place] < value:
            value, (levels, best) = values[place], offspring[place]
    return best


class _Mutations:
    """The levels of every layer, and random steps between them."""

    def __init__(self, problem: Problem, combination: Combination, random: np.random.Generator) -> None:
        choices, rows = combination[0], problem.rows(combination)
        apart = None if problem.settings.kinds is None else np.arange(len(choices.blocks))  # the worse may save a kind
        program = problem.program(combination, apart=apart)
        self.random, self.choices = random, choices
        self.terms = np.stack([row.terms for row in rows], axis=1)
        self.limits = np.array([row.limit for row in rows])
        layers = [program.entries[program.layers == layer] for layer in range(choices.num_layers)]
        self.entries = [entries[np.argsort(self.terms[entries].sum(axis=1), kind="stable")] for entries in layers]
        """By layer, from the cheapest by the shares of the bounds that it takes."""

    def blocks(self, levels: _Levels) -> tuple[str, ...]:
        return self.choices.architecture(self._chosen(levels))

    def levels_of(self, blocks: Sequence[str]) -> _Levels:
        """Each block's level, or where it has none that of the best block that dominates it."""
        levels = []
        for own, entries in zip(np.flatnonzero(self.choices.overlap(blocks)), self.entries, strict=True):
            affordable = (self.terms[entries] <= self.terms[own]).all(axis=1)
            scores = np.where(affordable, self.choices.scores[entries], np.inf)
            levels.append(int(np.where(entries == own, -np.inf, scores).argmin()))
        return np.array(levels)

    def of(self, levels: _Levels, count: int) -> Iterator[_Levels]:
        """Up to `count` mutations, each within the bounds as far as floats can tell."""
        tops = np.array([len(entries) - 1 for entries in self.entries])
        for _ in range(count):
            mutated = levels.copy()
            for _ in range(int(self.random.integers(1, _SWITCHES + 1))):
                if (able := np.flatnonzero(mutated < tops)).size:
                    layer = self.random.choice(able)
                    mutated[layer] = self.random.integers(mutated[layer] + 1, tops[layer] + 1)
            while not self._within(mutated) and mutated.any():
                layer = self.random.choice(np.flatnonzero(mutated))
                mutated[layer] = self.random.integers(0, mutated[layer])
            yield mutated

    def _within(self, levels: _Levels) -> bool:
        return bool((self.terms[self._chosen(levels)].sum(axis=0) <= self.limits).all())

    def _chosen(self, levels: _Levels) -> NDArray[np.int64]:
        return np.array([entries[level] for entries, level in zip(self.entries, levels, strict=True)])
