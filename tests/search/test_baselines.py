"""The uniform baseline against enumeration."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import BOUNDS, cost_row, cost_table, score_table, within

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.search import uniform_solution

ATTENTION, FFN = ("kv8", "kv2", "linear", "none"), ("w64", "w16", "linear", "none")
BLOCKS = [f"{attention}+{ffn}" for attention, ffn in itertools.product(ATTENTION, FFN)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[ScoreTable, CostTable, list[float]]:
    """Three layers of all blocks at two batch sizes, some scores missing, with block influences."""
    numbers = draw(st.lists(st.integers(0, 9), min_size=200, max_size=200))
    number = iter(numbers)
    rows, scores = [], []
    for batch_size in (1, 2):
        rows.append(cost_row(-1, "fixed", "", batch_size, prefill=1.0, decode=1.0))
    for layer in range(3):
        for part, variants in (("attention", ATTENTION), ("ffn", FFN)):
            for place, variant in enumerate(variants):
                params, kv, prefill = (next(number) * (3 - place) for _ in range(3))
                rows += [
                    cost_row(layer, part, variant, b, params=params, kv=kv, prefill=prefill * b, decode=float(prefill))
                    for b in (1, 2)
                ]
        missing = draw(st.sampled_from([None, None, None, "none+none", "kv2+w16", "kv8+w16"]))
        scores.append([(block, place and next(number) / 8) for place, block in enumerate(BLOCKS) if block != missing])
    return score_table(scores), cost_table(rows, (1, 2)), draw(st.permutations([0.1, 0.2, 0.3]))


def by_enumeration(
    scores: ScoreTable, costs: CostTable, bounds: Bounds, batch_size: int, influence: list[float]
) -> tuple[int, float] | None:
    """Layers dropped and the summed score of the best uniform architecture."""
    found = []
    present = {(row.layer, row.block) for row in scores.rows}
    for dropped in range(3):
        out = [layer for layer in range(3) if sorted(influence).index(influence[layer]) < dropped]
        for attention, ffn in itertools.product(("kv8", "kv2"), ("w64", "w16")):
            blocks = ["none+none" if layer in out else f"{attention}+{ffn}" for layer in range(3)]
            if all(item in present for item in enumerate(blocks)) and within(costs.totals(blocks, batch_size), bounds):
                found.append((dropped, scores.total(blocks)))
    return min(found, default=None)


@settings(max_examples=80, deadline=None)
@given(grids(), st.sampled_from(BOUNDS), st.floats(0.2, 1.2), st.sampled_from([1, 2]))
def test_the_uniform_baseline_is_the_best_of_its_kind(
    grid: tuple[ScoreTable, CostTable, list[float]], name: str, share: float, batch_size: int
) -> None:
    scores, costs, influence = grid
    value = costs.totals(["kv8+w64"] * 3, batch_size).as_dict()[name]
    bounds = Bounds(**{name: value / share if name == "throughput_tok_s" else max(value * share, 0.5)})
    expected = by_enumeration(scores, costs, bounds, batch_size, influence)
    if expected is None:
        with pytest.raises(PuzzleError, match="uniform baseline at batch size"):
            uniform_solution(scores, costs, bounds, batch_size, influence)
        return
    solution = uniform_solution(scores, costs, bounds, batch_size, influence)
    assert (solution.blocks.count("none+none"), solution.score) == (expected[0], pytest.approx(expected[1]))
    assert (solution.batch_size, solution.bounds, solution.proof) == (batch_size, bounds, None)
    assert within(costs.totals(solution.blocks, batch_size), bounds)
    kept = {block for block in solution.blocks if block != "none+none"}
    assert len(kept) == 1
    dropped = [value for block, value in zip(solution.blocks, influence, strict=True) if block == "none+none"]
    assert dropped == sorted(dropped, key=influence.index)
    assert sorted(dropped) == sorted(influence)[: len(dropped)]
