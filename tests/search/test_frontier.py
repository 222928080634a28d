"""The frontier against enumeration."""

import re
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.search.conftest import BOUNDS, SETTINGS, ask, cost_row, cost_table, everything, score_table, tables, within

from puzzle.artefacts import CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES
from puzzle.recipe import TargetSettings
from puzzle.report import solution_table, solutions_table
from puzzle.search import frontier, solve
from puzzle.search.exact import best
from puzzle.search.tables import Objective, parent_totals, violations


@settings(max_examples=25, deadline=None)
@given(tables(), st.sampled_from(BOUNDS))
def test_every_point_is_the_best_at_its_bound(case: tuple[ScoreTable, CostTable], quantity: str) -> None:
    scores, costs = case
    models = everything(scores, costs)
    points = frontier(ask(scores, costs, TargetSettings(), SETTINGS), quantity, points=4, end=3)
    parent, better = parent_totals(scores, costs)[quantity], QUANTITIES[quantity].better
    end = parent * 3 if QUANTITIES[quantity].at_least else parent / 3
    for step in range(4):
        bound = {quantity: parent + (end - parent) * step / 3}
        if allowed := [score for score, totals in models if within(totals, bound)]:
            first = next(each for each in points if not violations(each.predicted, bound))
            assert first.score == pytest.approx(min(allowed))
        else:
            values = [totals.as_dict()[quantity] for _, totals in models]
            assert points[-1].predicted[quantity] == pytest.approx(max(values) if end > parent else min(values))
    for easier, harder in pairwise(points):
        assert easier.blocks != harder.blocks or easier.batch_size != harder.batch_size
        assert easier.score <= harder.score + 1e-9
        assert better(harder.predicted[quantity], easier.predicted[quantity])


def one_layer() -> tuple[ScoreTable, CostTable]:
    """The smaller the faster; at batch size 2 everything is as fast, and so twice as much comes out."""
    rows = []
    for batch_size in (1, 2):
        rows += [cost_row(-1, "fixed", "", batch_size, prefill=1.0, decode=1.0), cost_row(0, "ffn", "w64", batch_size)]
        rows += [
            cost_row(0, "attention", f"kv{k}", batch_size, params=100 * k, kv=100, decode=float(k)) for k in (8, 4, 2)
        ]
    return score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.25), ("kv2+w64", 1.0)]]), cost_table(rows, (1, 2))


def test_other_bounds_are_kept_and_the_quantitys_own_is_not() -> None:
    points = frontier(ask(*one_layer(), TargetSettings(parameters="400", throughput="1000x"), SETTINGS), points=5)
    # kv2 takes 13/37 of the parent's time, kv4 21/37; the bounds are 1, 1.75, 2.5, 3.25 and 4 times its throughput.
    assert [point.blocks for point in points] == [("kv4+w64",), ("kv2+w64",)]
    assert [point.predicted["throughput_tok_s"] / point.parent["throughput_tok_s"] for point in points] == [
        pytest.approx(37 / 21),
        pytest.approx(37 / 13),
    ]
    assert {point.bounds["params"] for point in points} == {400}


def test_one_point_where_other_bounds_allow_nothing_better_than_the_parent() -> None:
    scores, costs = one_layer()
    smallest_batch = TargetSettings(memory="1700B")
    only_parent = replace(scores, rows=scores.rows[:1])
    points = frontier(ask(only_parent, costs, smallest_batch, SETTINGS), points=5)
    assert [(point.blocks, point.batch_size) for point in points] == [(("kv8+w64",), 1)]
    assert len(frontier(ask(scores, costs, smallest_batch, SETTINGS), points=5)) == 2


def test_a_model_that_takes_no_time_is_found_where_nothing_need_be_divided() -> None:
    for fixed in (-2.0, -1.0):
        rows = [cost_row(-1, "fixed", "", 1, prefill=fixed), cost_row(0, "ffn", "w64", 1)]
        rows += [cost_row(0, "attention", "kv8", 1, prefill=9.0), cost_row(0, "attention", "kv4", 1, prefill=1.0)]
        scores = score_table([[("kv8+w64", 0.0), ("kv4+w64", 1.0)]])
        asked = ask(scores, cost_table(rows, (1,)), TargetSettings(throughput="99x"), SETTINGS)
        assert solve(asked).blocks == ("kv4+w64",)
        assert [point.blocks for point in frontier(asked)] == [("kv8+w64",), ("kv4+w64",)]
        console = Console(file=StringIO())
        console.print(solutions_table(frontier(asked), scores.parent_blocks, "throughput_tok_s"))
        console.print(solution_table(solve(asked), scores.parent_blocks))
        printed = console.file.getvalue()
        assert re.search(r"^ *- +- +1\.000 ", printed, re.MULTILINE)
        assert re.search(r"^throughput +\S+ tok/s +- +-$", printed, re.MULTILINE)
        with pytest.raises(PuzzleError, match=r"is predicted as (-5,000|0) tok/s, which is noise"):
            best(asked, objective=Objective("throughput_tok_s"))


def test_other_bounds_out_of_reach_are_explained() -> None:
    with pytest.raises(PuzzleError, match=r"target.parameters: 100 asked; reachable 800 \(parent\) to 200"):
        frontier(ask(*one_layer(), TargetSettings(parameters="100", throughput="2x"), SETTINGS))


def test_a_quantity_that_can_be_nothing() -> None:
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0), cost_row(0, "ffn", "w64", 1)]
    rows += [cost_row(0, "attention", f"kv{k}", 1, params=k) for k in (8, 4, 0)]
    scores = score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.5), ("kv0+w64", 1.0)]])
    points = frontier(ask(scores, cost_table(rows, (1,)), TargetSettings(), SETTINGS), "params", 3)
    assert [(point.blocks, point.bounds["params"]) for point in points] == [
        (("kv8+w64",), 8),
        (("kv4+w64",), 5),
        (("kv0+w64",), 2),
    ]
