"""Pair terms against enumeration."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import architectures, within
from tests.search.test_solve import bounded, two_batches

from puzzle.artefacts import Bounds, CostTable, PairTerm, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import solve
from puzzle.search.exact import Instance, Objective, best_architecture

SETTINGS = SearchSettings(gap=1e-9, margin=0.0)


@st.composite
def with_pairs(draw: st.DrawFn) -> tuple[ScoreTable, CostTable, Bounds, list[PairTerm]]:
    """Tables with bounds, and pair terms of both signs, some of them twice and in either order of their layers."""
    scores, costs, bounds = draw(bounded())
    pairs = []
    if scores.num_layers > 1:
        for _ in range(draw(st.integers(1, 5))):
            first, second = draw(st.permutations(range(scores.num_layers)))[:2]
            blocks = tuple(draw(st.sampled_from(scores.layer(layer))).block for layer in (first, second))
            pairs.append(PairTerm(layers=(first, second), blocks=blocks, score=draw(st.integers(-8, 8)) / 8))
    return scores, costs, bounds, pairs


def total(scores: ScoreTable, pairs: list[PairTerm], blocks: tuple[str, ...]) -> float:
    """The meaning of pair terms, written a second time."""
    sum_of_pairs = 0.0
    for pair in pairs:
        (first, second), (one, other) = pair.layers, pair.blocks
        if blocks[first] == one and blocks[second] == other:
            sum_of_pairs += pair.score
    return scores.total(blocks) + sum_of_pairs


@settings(max_examples=50, deadline=None)
@given(with_pairs(), st.sampled_from([None, "all", 2]), st.booleans())
def test_the_solution_is_the_best_with_its_pair_terms(
    case: tuple[ScoreTable, CostTable, Bounds, list[PairTerm]], equal: str | int | None, bound_score: bool
) -> None:
    scores, costs, bounds, pairs = case
    rules = SETTINGS.model_copy(update={"equal": equal if _common(scores, equal) else None})
    found = {
        blocks: total(scores, pairs, blocks)
        for blocks in architectures(scores)
        if any(within(costs.totals(blocks, b), bounds) for b in costs.batch_sizes) and _is_equal(blocks, rules.equal)
    }
    instance = Instance.of(scores, costs, constraints=rules, pairs=pairs)
    solution = best_architecture(instance, bounds, rules)
    if not found:
        assert solution is None
        return
    assert solution is not None
    best = min(found.values())
    assert solution.score == pytest.approx(best, abs=1e-9)
    assert total(scores, pairs, solution.blocks) == pytest.approx(solution.score, abs=1e-12)
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
    if bound_score and best > 0:
        bounds = bounds | {"score": best * 1.25}
        smallest = best_architecture(instance, bounds, rules, Objective("params"))
        params = [
            costs.totals(blocks, b).cost.params
            for blocks, score in found.items()
            for b in costs.batch_sizes
            if score <= best * 1.25 and within(costs.totals(blocks, b), bounds)
        ]
        assert smallest is not None
        assert smallest.predicted["params"] == min(params)


def _common(scores: ScoreTable, equal: str | int | None) -> bool:
    names = [{row.block for row in scores.layer(layer)} for layer in range(scores.num_layers)]
    return equal is None or bool(set.intersection(*names))


def _is_equal(blocks: tuple[str, ...], equal: str | int | None) -> bool:
    size = {None: 1, "all": len(blocks)}.get(equal, equal)
    return all(len(set(blocks[start : start + size])) == 1 for start in range(0, len(blocks), size))


def two_layers() -> tuple[ScoreTable, CostTable]:
    """Twice the layer of `two_batches`."""
    scores, costs = two_batches()
    again = [replace(row, layer=1) for row in scores.rows]
    rows = [replace(row, layer=1) for row in costs.rows if row.layer == 0]
    return replace(scores, num_layers=2, rows=(*scores.rows, *again)), replace(costs, rows=(*costs.rows, *rows))


def test_a_block_that_is_worse_alone_is_chosen_for_its_pair() -> None:
    pair = PairTerm(layers=(1, 0), blocks=("kv4+w64", "kv4+w64"), score=-1.5)
    target = TargetSettings(parameters="100%")
    solution = solve(*two_layers(), target, SETTINGS, pairs=[pair])
    assert (solution.blocks, solution.score) == (("kv4+w64", "kv4+w64"), -0.5)
    assert solve(*two_layers(), target, SETTINGS).blocks == ("kv8+w64", "kv8+w64")


@pytest.mark.parametrize(("term", "most", "params"), [(1.0, 1.5, 170), (-0.75, 0.3, 130), (0.0, 1.5, 130)])
def test_a_bound_on_the_score_counts_pair_terms(term: float, most: float, params: int) -> None:
    settings = SETTINGS.model_copy(update={"objective": "parameters"})
    pair = PairTerm(layers=(0, 1), blocks=("kv4+w64", "kv4+w64"), score=term)
    solution = solve(*two_layers(), TargetSettings(score=most), settings, pairs=[pair])
    assert solution.predicted["params"] == params


@pytest.mark.parametrize(("layers", "score"), [((0, 0), 0.5), ((0, 1), 0.5), ((-1, 0), 0.5), ((0, 1), math.nan)])
def test_a_pair_term_that_makes_no_sense(layers: tuple[int, int], score: float) -> None:
    pair = PairTerm(layers=layers, blocks=("kv4+w64", "kv4+w64"), score=score)
    with pytest.raises(PuzzleError, match=r"pairs: found layers .* needs two different layers of 0 to 0"):
        solve(*two_batches(), TargetSettings(parameters="70"), SETTINGS, pairs=[pair])


def test_pairs_of_blocks_that_cannot_be_chosen_are_left_out() -> None:
    terms = [PairTerm(layers=(0, 1), blocks=names, score=-9.0) for names in itertools.permutations(("kv4+w64", "gone"))]
    assert solve(*two_layers(), TargetSettings(parameters="150"), SETTINGS, pairs=terms).score == 1.0
