"""The search as arrays: every choice of every layer at one batch size, and the mixed-integer program over them.

Shapes: n is the number of choices of all layers together, layer by layer; L the number of layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from puzzle.artefacts import Bounds, Cost, CostTable, ScoreName, ScoreTable, Totals
from puzzle.search.bounds import QUANTITIES, TIME_TOLERANCE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What every layer can choose at one batch size. Whole numbers below 2**53 are exact in float64."""

    batch_size: int
    generated_tokens: int
    num_layers: int
    layers: Ints
    """[n], ascending."""
    blocks: tuple[str, ...]
    scores: Floats
    """[n]."""
    costs: Mapping[str, Floats]
    """By quantity: the term of its sum over layers, [n]."""
    fixed: Mapping[str, float]
    """By quantity: the term that every architecture has."""

    def cheapest(self, name: str) -> float:
        """The lowest sum over layers of a quantity that any architecture has: layers choose independently."""
        lowest = np.full(self.num_layers, np.inf)
        np.minimum.at(lowest, self.layers, self.costs[name])
        return self.fixed[name] + float(lowest.sum())


def tabulate(scores: ScoreTable, costs: CostTable, score: ScoreName = "kl") -> list[Choices]:
    """The choices at each allowed batch size, with `score` to add up: every row must have it."""
    rows = sorted(scores.rows, key=lambda row: row.layer)
    values = np.array([scores.value(row.layer, row.block, score) for row in rows], dtype=np.float64)
    assert np.isfinite(values).all(), "a score that is not finite must not be in the score table"

    def at(batch_size: int) -> Choices:
        def terms(cost: Cost) -> list[float]:
            part = Totals(batch_size=batch_size, generated_tokens=costs.scenario.generated_tokens, cost=cost)
            return [quantity.additive(part) for quantity in QUANTITIES.values()]

        table = np.array([terms(costs.block(row.layer, row.block, batch_size)) for row in rows], dtype=np.float64)
        assert np.isfinite(table).all(), "a cost is not finite"
        return Choices(
            batch_size=batch_size,
            generated_tokens=costs.scenario.generated_tokens,
            num_layers=scores.num_layers,
            layers=np.array([row.layer for row in rows], dtype=np.int64),
            blocks=tuple(row.block for row in rows),
            scores=values,
            costs=dict(zip(QUANTITIES, table.T, strict=True)),
            fixed=dict(zip(QUANTITIES, terms(costs.fixed(batch_size)), strict=True)),
        )

    return [at(batch_size) for batch_size in sorted(set(costs.batch_sizes))]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sum over layers with an upper limit, divided by the bound: every row's numbers are around 1 and the solver's
    tolerance is a share of the bound.
    """

    terms: Floats
    limit: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """Choose one entry of each layer so that every row's sum keeps its limit and the objective's sum is lowest."""

    num_layers: int
    layers: Ints
    """[n], ascending."""
    objective: Floats
    rows: tuple[Row, ...]
    entries: Ints
    """[n]: where each is in `Choices`."""
    excluded: tuple[Ints, ...] = ()
    """Architectures, as positions [L], that must not be chosen again."""

    def without(self, positions: Ints) -> "Program":
        return replace(self, excluded=(*self.excluded, positions))


def build_program(choices: Choices, objective: Floats, bounds: Bounds) -> Program:
    """The program that minimises the sum of `objective` within `bounds`, dominated choices left out."""
    rows = tuple(_row(choices, name, bound) for name, bound in bounds.given().items())
    entries = _undominated(choices, objective, [row.terms for row in rows])
    return Program(
        num_layers=choices.num_layers,
        layers=choices.layers[entries],
        objective=objective[entries],
        rows=tuple(replace(row, terms=row.terms[entries]) for row in rows),
        entries=entries,
    )


def _row(choices: Choices, name: str, bound: float) -> Row:
    limit = largest_sum(choices, name, bound)
    return Row(terms=choices.costs[name] / limit, limit=(limit - choices.fixed[name]) / limit)


def largest_sum(choices: Choices, name: str, bound: float) -> float:
    """Up to where the sum over layers of a quantity, fixed part included, is within `bound`.

    Half a byte above it, or half the tolerance that the check allows, so that a sum at the very limit is not lost to
    rounding.
    """
    quantity = QUANTITIES[name]
    limit = quantity.convert(bound, choices.batch_size, choices.generated_tokens)
    return math.floor(limit) + 0.5 if quantity.whole else limit * (1 + TIME_TOLERANCE / 2)


def _undominated(choices: Choices, objective: Floats, terms: Sequence[Floats]) -> Ints:
    """Entries for which no other of their layer is at least as good in the objective and in every row, ascending.

    Of equals one stays: the fastest, of these the first.
    """
    columns = np.stack([objective, *terms], axis=1)
    order = np.lexsort((choices.costs["request_ms"], *columns.T[::-1], choices.layers))
    starts = np.searchsorted(choices.layers[order], np.arange(choices.num_layers + 1))
    kept = []
    for start, end in pairwise(starts):
        entries = order[start:end]
        values = columns[entries]
        # [i, j]: i is no worse than j. An entry that dominates another, or equals it, comes before it in this order.
        no_worse = (values[:, None, :] <= values[None, :, :]).all(axis=2)
        kept.append(entries[~np.triu(no_worse, k=1).any(axis=0)])
    return np.sort(np.concatenate(kept))
