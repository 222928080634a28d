"""Several scenarios at once, against enumeration."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import BOUNDS, SETTINGS, architectures, ask, cost_row, cost_table, within
from tests.search.test_solve import bounded, two_batches

from puzzle.artefacts import Bounds, CostRow, CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.recipe import TargetSettings
from puzzle.search import solve
from puzzle.search.exact import best


@st.composite
def two_scenarios(draw: st.DrawFn) -> tuple[ScoreTable, CostTable, Bounds, CostTable, Bounds]:
    """A second cost table of the same blocks, with other times and batch sizes, and bounds near some architecture."""
    scores, costs, bounds = draw(bounded())
    sizes = draw(st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=2, unique=True))

    def other(row: CostRow, batch_size: int) -> CostRow:
        times = {name: draw(st.integers(1, 6)) / 4 for name in ("prefill_ms", "decode_ms")}
        return replace(row, batch_size=batch_size, **times)

    rows = [other(row, size) for size in sizes for row in costs.rows if row.batch_size == costs.batch_sizes[0]]
    further = cost_table(rows, sizes, generated_tokens=3)
    blocks = draw(st.sampled_from([*architectures(scores)]))
    near = further.totals(blocks, draw(st.sampled_from(sizes))).as_dict()
    names = draw(st.lists(st.sampled_from(BOUNDS), min_size=1, max_size=2, unique=True))
    there = Bounds(**{name: near[name] * draw(st.sampled_from([0.9, 1.0, 1.1])) or 0.5 for name in names})
    return scores, costs, bounds, further, there


@settings(max_examples=60, deadline=None)
@given(two_scenarios())
def test_one_architecture_meets_all_bounds(case: tuple[ScoreTable, CostTable, Bounds, CostTable, Bounds]) -> None:
    scores, costs, bounds, further, there = case
    found = [
        scores.total(blocks)
        for blocks in architectures(scores)
        if any(
            within(costs.totals(blocks, one), bounds) and within(further.totals(blocks, other), there)
            for one, other in itertools.product(costs.batch_sizes, further.batch_sizes)
        )
    ]
    solution = best(ask(scores, costs, further=[(further, TargetSettings())]), [bounds, there])
    if not found:
        assert solution is None
        return
    assert solution is not None
    assert solution.score == pytest.approx(min(found), abs=1e-9)
    (serving,) = solution.further
    totals = further.totals(solution.blocks, serving.batch_size)
    assert serving.predicted == totals.as_dict()
    assert within(totals, there)
    assert Solution.from_json(solution.to_json()) == solution


def _long_prompts() -> CostTable:
    """There `kv4` takes half the memory, and no less time."""
    rows = [cost_row(-1, "fixed", "", 8, params=10, prefill=2.0, decode=1.0), cost_row(0, "ffn", "w64", 8)]
    rows += [cost_row(0, "attention", f"kv{k}", 8, params=k, kv=k * 1000, decode=9.0) for k in (8, 4)]
    return cost_table(rows, (8,))


def test_relative_bounds_are_of_the_parent_in_their_scenario() -> None:
    further = [(_long_prompts(), TargetSettings(memory="60%"))]
    solution = solve(ask(*two_batches(), TargetSettings(throughput="0.1x"), SETTINGS, further=further))
    assert solution.blocks == ("kv4+w64",)
    (serving,) = solution.further
    assert (serving.batch_size, serving.parent["memory_bytes"]) == (8, 64036)
    assert serving.asked == Bounds(memory_bytes=int(0.6 * 64036))


def test_what_cannot_be_met_there_is_explained() -> None:
    further = [(_long_prompts(), TargetSettings(latency="10ms"))]
    with pytest.raises(
        PuzzleError, match=r"scenarios\[0\].target.latency: 10ms asked; reachable 42ms \(parent\) to 42ms"
    ):
        solve(ask(*two_batches(), TargetSettings(throughput="0.1x"), SETTINGS, further=further))
    further = [(_long_prompts(), TargetSettings(memory="60%"))]
    line = (
        r"target.score: 0.1, scenarios\[0\].target.memory: 60% \(38.42kB\): each alone can be met, together they "
        r"cannot; nearest with the other bounds kept: target.score: 0.5$"
    )
    with pytest.raises(PuzzleError, match=line):
        solve(ask(*two_batches(), TargetSettings(score=0.1), SETTINGS, further=further))
