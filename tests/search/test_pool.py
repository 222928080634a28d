"""Pools of solutions against enumeration."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import SETTINGS, architectures, ask, cost_row, cost_table, score_table, within
from tests.search.test_solve import bounded, two_batches

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES
from puzzle.recipe import TargetSettings
from puzzle.search import pool


def _apart(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _best_scores(scores: ScoreTable, costs: CostTable, bounds: Bounds) -> dict[tuple[str, ...], float]:
    """Of every architecture that is within the bounds at any batch size."""
    return {
        blocks: scores.total(blocks)
        for blocks in architectures(scores)
        if any(within(costs.totals(blocks, batch_size), bounds) for batch_size in costs.batch_sizes)
    }


@settings(max_examples=50, deadline=None)
@given(bounded(), st.integers(1, 3), st.integers(1, 6))
def test_each_is_the_best_of_those_far_enough_from_all_before(
    case: tuple[ScoreTable, CostTable, Bounds], differing: int, count: int
) -> None:
    scores, costs, bounds = case
    differing = min(differing, scores.num_layers)
    left = _best_scores(scores, costs, bounds)
    target = TargetSettings(
        **{QUANTITIES[name].setting: f"{value:.12f}" + _unit(name) for name, value in bounds.items()}
    )
    try:
        found = pool(ask(scores, costs, target, SETTINGS), count, differing)
    except PuzzleError:
        assert not left
        return
    assert all(_apart(a.blocks, b.blocks) >= differing for a, b in itertools.combinations(found, 2))
    for solution in found:
        tolerance = 1e-9 if differing == 1 else 1.1e-3 * min(left.values())
        assert solution.score == pytest.approx(left[solution.blocks], abs=1e-9)
        assert solution.score <= min(left.values()) + tolerance + 1e-9
        left = {blocks: score for blocks, score in left.items() if _apart(blocks, solution.blocks) >= differing}
    assert len(found) == count or not left
    assert [each.score for each in found] == sorted(each.score for each in found)


def _unit(name: str) -> str:
    return {"throughput_tok_s": " tok/s", "params": ""}.get(name, "ms" if name.endswith("_ms") else "B")


def test_a_dominated_block_and_another_batch_size() -> None:
    """`kv3` is worse and no cheaper than `kv4`, and an architecture is one at whatever batch size."""
    rows = []
    for batch_size in (1, 2):
        rows += [cost_row(-1, "fixed", "", batch_size, prefill=1.0, decode=1.0), cost_row(0, "ffn", "w64", batch_size)]
        rows += [cost_row(0, "attention", f"kv{k}", batch_size, params=k if k != 3 else 4) for k in (8, 4, 3)]
    scores = score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.5), ("kv3+w64", 0.75)]])
    found = pool(ask(scores, cost_table(rows, (1, 2)), TargetSettings(parameters="4"), SETTINGS), 3, 1)
    assert [each.blocks for each in found] == [("kv4+w64",), ("kv3+w64",)]
    assert [each.proof.status for each in found if each.proof] == ["optimal", "optimal"]


def test_differing_out_of_range_is_said() -> None:
    with pytest.raises(PuzzleError, match="pool: found differing 2; it must be from 1 to the 1 layers"):
        pool(ask(*two_batches(), TargetSettings(parameters="70"), SETTINGS), 2, 2)
