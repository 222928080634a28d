"""Scores around an architecture: each of its blocks replaced alone, in it rather than in the parent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle.artefacts import CostTable, PairTerm, ScoreName, ScoreTable, Solution, Totals
from puzzle.correct.whole import Blocks
from puzzle.quantities import COSTS

_SLACK, _LAYER_SLACK = 0.05, 0.5
"""Of the summed score, or of a layer's mean share if that is less, as in deep models: see `matter`. How many blocks it
leaves is in benchmarks/search_quality.md."""

Evaluate = Callable[[Sequence[Blocks]], list[float]]
Places = frozenset[tuple[int, str]]
"""Blocks in layers."""


def matter(scores: ScoreTable, costs: CostTable, solution: Solution, score: ScoreName) -> Places:
    """The blocks that architectures nearly as good as the solution may take.

    At the price that the solution pays for what is bounded, in score for a share of the bounds, each layer has a best
    block. What is worse there by more than any block of the solution and what `_SLACK` says does not matter.
    """
    value = {(row.layer, row.block): scores.value(row.layer, row.block, score) for row in scores.rows}
    cost = {place: _share(costs, solution, *place) for place in value}
    price = _price(value, cost, [*enumerate(solution.blocks)])
    priced = {place: value[place] + price * cost[place] for place in value}
    best = [min(priced[place] for place in priced if place[0] == layer) for layer in range(scores.num_layers)]
    # The solution's own blocks may be worse than the best too: nothing in between may cost exactly what is left.
    own = max(priced[place] - best[place[0]] for place in enumerate(solution.blocks))
    share = min(_SLACK, _LAYER_SLACK / scores.num_layers)
    room = own + share * abs(sum(value[place] for place in enumerate(solution.blocks)))
    return frozenset(place for place in priced if priced[place] <= best[place[0]] + room)


def _price(
    value: dict[tuple[int, str], float], cost: dict[tuple[int, str], float], chosen: Sequence[tuple[int, str]]
) -> float:
    """A share of the bounds in score: between the cheapest saving there is and the best use of what is saved."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for place in value:
        own = chosen[place[0]]
        if cost[place] != cost[own]:
            rates[cost[place] < cost[own]].append((value[place] - value[own]) / (cost[own] - cost[place]))
    ends = [max(0.0, end(some)) for end, some in ((min, rates[True]), (max, rates[False])) if some]
    return math.sqrt(math.prod(ends)) if len(ends) == 2 else sum(ends)


def around(
    centre: Blocks, scores: ScoreTable, some: Places, evaluate: Evaluate, score: ScoreName = "kl"
) -> ScoreTable | None:
    """The table with the scores that `some` blocks, and the parent's, have in `centre`, given as KL.

    Sums of these are exact for `centre` and its neighbours, up to one constant: of each layer the parent's own block
    is at 0, as in every table, and what is better in that place is below. Other blocks are there for constraints of
    the search: with their own score, and the most that another block of their layer is worse here than there.

    None where `centre` with a block of the parent's is not finite, and so no other block is comparable.
    """
    places = [(row.layer, row.block) for row in scores.rows]
    own = {layer: scores.parent_row(layer).block for layer in range(scores.num_layers)}
    scored = [place for place in places if place in some or place[1] == own[place[0]]]
    values = dict(zip(scored, evaluate([with_blocks(centre, dict([place])) for place in scored]), strict=True))
    if not all(math.isfinite(values[place]) for place in own.items()):
        return None
    here = {place: value - values[place[0], own[place[0]]] for place, value in values.items() if math.isfinite(value)}
    there = {place: scores.value(*place, score) for place in places}
    worse = {layer: max(0.0, *(here[at] - there[at] for at in here if at[0] == layer)) for layer in own}
    here |= {place: there[place] + worse[place[0]] for place in places if place not in values}
    rows = [replace(row, kl=here[row.layer, row.block]) for row in scores.rows if (row.layer, row.block) in here]
    return replace(scores, rows=tuple(sorted(rows, key=lambda row: (row.layer, row.block != own[row.layer]))))


def pair_term(centre: Blocks, swaps: dict[int, str], evaluate: Evaluate) -> PairTerm:
    """What two replaced blocks add in `centre` beyond what each adds alone."""
    (first, one), (second, other) = sorted(swaps.items())
    architectures = [centre, *(with_blocks(centre, some) for some in ({first: one}, {second: other}, swaps))]
    none, left, right, both = evaluate(architectures)
    return PairTerm(layers=(first, second), blocks=(one, other), score=both - left - right + none)


def with_blocks(blocks: Blocks, swaps: dict[int, str]) -> Blocks:
    return tuple(swaps.get(layer, block) for layer, block in enumerate(blocks))


def _share(costs: CostTable, solution: Solution, layer: int, block: str) -> float:
    """What a block adds to the sums that are bounded, as shares of the solution's own, all together."""
    generated = costs.scenario.generated_tokens
    cost = costs.block(layer, block, solution.batch_size)
    whole = costs.totals(solution.blocks, solution.batch_size)
    part = Totals(batch_size=solution.batch_size, generated_tokens=generated, cost=cost)
    bounded = [COSTS[name] for name in solution.bounds if name in COSTS]
    return sum(quantity.additive(part) / quantity.additive(whole) for quantity in bounded)
