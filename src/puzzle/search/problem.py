"""The search as arrays: every choice of every layer at one batch size, and the mixed-integer program over them.

Shapes: n is the number of choices of all layers together, layer by layer; L the number of layers, those that are to be
equal (`search.equal`) counted as one; N the number of columns: n and the auxiliary ones of links.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from puzzle.artefacts import Bounds, Cost, CostTable, ScoreName, ScoreTable, Totals
from puzzle.quantities import COSTS, QUANTITIES, TIME_TOLERANCE
from puzzle.search.constraints import Allowed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LARGEST = 1e12
"""Term of a row, as a share of its bound: more is refused by the solver, and no less out of reach."""


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
    groups: Ints
    """For each layer of the model, which of the L it is."""

    def terms(self, name: str) -> Floats:
        """[n]: of a quantity, or of the score."""
        return self.scores if name == "score" else self.costs[name]

    def constant(self, name: str) -> float:
        """What every architecture has of a quantity, or of the score."""
        return 0.0 if name == "score" else self.fixed[name]

    def architecture(self, entries: Ints) -> tuple[str, ...]:
        """One block name a layer of the model, of one entry a layer [L]."""
        return tuple(self.blocks[entries[group]] for group in self.groups)

    def overlap(self, blocks: Sequence[str]) -> Floats:
        """[n]: in how many layers of the model each entry is what `blocks` has there."""
        same = np.zeros(len(self.blocks))
        for layer, block in enumerate(blocks):
            entries = range(*np.searchsorted(self.layers, (self.groups[layer], self.groups[layer] + 1)))
            same[[entry for entry in entries if self.blocks[entry] == block]] += 1
        return same


def tabulate(scores: ScoreTable, costs: CostTable, score: ScoreName, allowed: Allowed) -> list[Choices]:
    """The choices at each batch size of `costs`, with `score` to add up: every row must have it."""
    members = [[layer for layer, own in enumerate(allowed.groups) if own == group] for group in range(len(allowed))]
    entries = [(group, block) for group, blocks in enumerate(allowed.blocks) for block in blocks]
    values = np.array([sum(scores.value(layer, block, score) for layer in members[g]) for g, block in entries])
    assert np.isfinite(values).all(), "a score that is not finite must not be in the score table"

    def at(batch_size: int) -> Choices:
        def terms(cost: Cost) -> list[float]:
            part = Totals(batch_size=batch_size, generated_tokens=costs.scenario.generated_tokens, cost=cost)
            return [quantity.additive(part) for quantity in COSTS.values()]

        def cost(group: int, block: str) -> Cost:
            return sum((costs.block(layer, block, batch_size) for layer in members[group]), Cost())

        table = np.array([terms(cost(group, block)) for group, block in entries], dtype=np.float64)
        assert np.isfinite(table).all(), "a cost is not finite"
        return Choices(
            batch_size=batch_size,
            generated_tokens=costs.scenario.generated_tokens,
            num_layers=len(allowed),
            layers=np.array([group for group, _ in entries], dtype=np.int64),
            blocks=tuple(block for _, block in entries),
            scores=values,
            costs=dict(zip(COSTS, table.T, strict=True)),
            fixed=dict(zip(COSTS, terms(costs.fixed(batch_size)), strict=True)),
            groups=np.array(allowed.groups, dtype=np.int64),
        )

    return [at(batch_size) for batch_size in sorted(set(costs.batch_sizes))]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sum over columns with an upper limit; that of a bound is divided by it, so that its numbers are around 1 and
    the solver's tolerance is a share of the bound.
    """

    terms: Floats
    """[N]."""
    limit: float
    pairs: float = 0.0
    """What the scores of pair terms are multiplied by in it; 0 where it is not on the score."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A sum over a few columns with two limits, which ties auxiliary columns to choices."""

    columns: Ints
    values: Floats
    lower: float
    upper: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """Choose one entry of each layer so that every row's sum keeps its limit and the objective's sum is lowest."""

    num_layers: int
    layers: Ints
    """[n], ascending."""
    objective: Floats
    """[N]."""
    rows: tuple[Row, ...]
    entries: Ints
    """[n]: where each is in `Choices`."""
    links: tuple[Link, ...] = ()

    def without(self, positions: Ints) -> "Program":
        """With one architecture, as positions [L], excluded."""
        terms = np.zeros(len(self.objective))
        terms[positions] = 1.0
        return replace(self, rows=(*self.rows, Row(terms=terms, limit=self.num_layers - 1.0)))

    def restricted(self, kept: Ints) -> "Program":
        """With the entries at positions `kept` alone, all others left out."""
        size, total = len(self.layers), len(self.objective)
        columns = np.concatenate([kept, np.arange(size, total)])
        place = np.full(total, -1)
        place[columns] = np.arange(len(columns))
        return Program(
            num_layers=self.num_layers,
            layers=self.layers[kept],
            objective=self.objective[columns],
            rows=tuple(replace(row, terms=row.terms[columns]) for row in self.rows),
            entries=self.entries[kept],
            links=tuple(
                replace(link, columns=place[link.columns[there]], values=link.values[there])
                for link in self.links
                for there in [place[link.columns] >= 0]
            ),
        )


def build_program(
    choices: Choices, objective: Floats, bounds: Bounds, *, rows: Sequence[Row] = (), apart: Ints | None = None
) -> Program:
    """The program that minimises the sum of `objective` within `bounds`, dominated choices left out.

    Args:
        rows: further ones, over all choices.
        apart: [n], a number for each choice; only choices of one number may dominate each other.
    """
    rows = (*bound_rows(choices, bounds), *rows)
    entries = _undominated(choices, objective, [row.terms for row in rows], apart)
    return Program(
        num_layers=choices.num_layers,
        layers=choices.layers[entries],
        objective=objective[entries],
        rows=tuple(replace(row, terms=row.terms[entries]) for row in rows),
        entries=entries,
    )


def bound_rows(choices: Choices, bounds: Bounds) -> list[Row]:
    """The rows of all bounds that are set, that on the score last."""
    return [_row(choices, name, bound) for name, bound in bounds.items()]


def _row(choices: Choices, name: str, bound: float) -> Row:
    limit = _largest_sum(choices, name, bound)
    return Row(
        terms=(choices.terms(name) / limit).clip(-_LARGEST, _LARGEST),
        limit=max((limit - choices.constant(name)) / limit, -_LARGEST),
        pairs=1 / limit if name == "score" else 0.0,
    )


def _largest_sum(choices: Choices, name: str, bound: float) -> float:
    """Up to where the sum over layers of a quantity, fixed part included, is within `bound`.

    Half a byte above it, or half the tolerance that the check allows, so that a sum at the very limit is not lost to
    rounding.
    """
    if name != "score":
        bound = QUANTITIES[name].convert(bound, choices.batch_size, choices.generated_tokens)
        if QUANTITIES[name].exact:
            return math.floor(bound) + 0.5
    return bound * (1 + TIME_TOLERANCE / 2)


def _undominated(choices: Choices, objective: Floats, terms: Sequence[Floats], apart: Ints | None) -> Ints:
    """Entries for which no other of their layer is at least as good in the objective and in every row, ascending.

    Of equals one stays: the fastest, of these the first.
    """
    separating = [] if apart is None else [apart, -apart]
    columns = np.stack([choices.costs["request_ms"], objective, *terms, *separating], axis=1)
    starts = np.searchsorted(choices.layers, np.arange(choices.num_layers))
    place = np.arange(len(columns)) - starts[choices.layers]
    table = np.full((choices.num_layers, place.max() + 1, columns.shape[1]), np.inf)
    table[choices.layers, place] = columns
    # [layer, i, j]: i is no worse than j; and of two that are no worse than each other, i is the one that stays.
    no_worse = np.ones((table.shape[0], table.shape[1], table.shape[1]), dtype=bool)
    for column in np.moveaxis(table[..., 1:], 2, 0):
        no_worse &= column[:, :, None] <= column[:, None, :]
    faster = table[:, :, None, 0] < table[:, None, :, 0]
    stays = faster | (~faster.transpose(0, 2, 1) & np.triu(np.ones(no_worse.shape[1:], dtype=bool), k=1))
    dominated: NDArray[np.bool_] = np.any(no_worse & (stays | ~no_worse.transpose(0, 2, 1)), axis=1)
    return np.flatnonzero(~dominated[choices.layers, place])
