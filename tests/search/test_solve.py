"""The solver against enumeration (law 8)."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import (
    BOUNDS,
    FFN,
    SETTINGS,
    architectures,
    ask,
    cost_row,
    cost_table,
    everything,
    score_table,
    tables,
    within,
)

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import solve
from puzzle.search.exact import best
from puzzle.search.tables import Objective, parent_totals, resolve_bounds, violations

examples = settings(max_examples=60, deadline=None)  # a busy machine is no error


@st.composite
def bounded(draw: st.DrawFn, fewest: int = 1, most: int = 4) -> tuple[ScoreTable, CostTable, Bounds]:
    """Tables with bounds at or near what some architecture has, all kinds of them and so many at once."""
    scores, costs = draw(tables())
    bounds = {}
    for name in draw(st.lists(st.sampled_from(BOUNDS), min_size=fewest, max_size=most, unique=True)):
        _, near = draw(st.sampled_from(everything(scores, costs)))
        bounds[name] = near.as_dict()[name] * draw(st.sampled_from([0.8, 1.0, 1.0, 1.1])) or 0.5
    return scores, costs, Bounds(**bounds)


@examples
@given(bounded())
def test_the_solution_is_the_best_of_all_architectures(case: tuple[ScoreTable, CostTable, Bounds]) -> None:
    scores, costs, bounds = case
    feasible = [score for score, totals in everything(scores, costs) if within(totals, bounds)]
    solution = best(ask(scores, costs), [bounds])
    if not feasible:
        assert solution is None
        return
    assert solution is not None
    assert solution.score == pytest.approx(min(feasible), abs=1e-9)
    score, totals = scores.total(solution.blocks), costs.totals(solution.blocks, solution.batch_size)
    assert (score, totals.as_dict()) == (solution.score, solution.predicted)
    assert within(totals, bounds)
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
    assert solution.proof.bound == pytest.approx(min(feasible), abs=1e-6)


@examples
@given(bounded(), st.sampled_from(BOUNDS))
def test_the_best_value_is_the_best_of_all_architectures(case: tuple[ScoreTable, CostTable, Bounds], name: str) -> None:
    scores, costs, bounds = case
    bounds = {key: bounds[key] for key in bounds if key != name}
    values = [totals.as_dict()[name] for _, totals in everything(scores, costs) if within(totals, bounds)]
    solution = best(ask(scores, costs), [bounds], objective=Objective(name))
    if not values:
        assert solution is None
        return
    assert solution is not None
    expected = max(values) if name == "throughput_tok_s" else min(values)
    assert solution.predicted[name] == pytest.approx(expected, rel=1e-6)


@examples
@given(bounded())
def test_a_check_of_bounds_agrees_with_their_meaning(case: tuple[ScoreTable, CostTable, Bounds]) -> None:
    scores, costs, bounds = case
    for _, totals in everything(scores, costs):
        assert (not violations(totals.as_dict(), bounds)) == within(totals, bounds)


@settings(max_examples=25, deadline=None)
@given(bounded())
def test_the_same_search_gives_the_same_architecture(case: tuple[ScoreTable, CostTable, Bounds]) -> None:
    scores, costs, bounds = case
    first, second = (best(ask(scores, costs), [bounds]) for _ in range(2))
    if first is None or second is None:
        assert first is second
    else:
        assert replace(first, proof=None) == replace(second, proof=None)


def two_batches() -> tuple[ScoreTable, CostTable]:
    """One layer; the parent takes 10 ms a step at batch size 1 and 12 at 4, its smaller twin half of that."""
    rows = []
    for batch_size, step in ((1, 10.0), (4, 12.0)):
        rows += [
            cost_row(-1, "fixed", "", batch_size, params=10, prefill=2.0, decode=1.0),
            cost_row(0, "attention", "kv8", batch_size, params=100, kv=50, prefill=step, decode=step),
            cost_row(0, "attention", "kv4", batch_size, params=60, kv=25, prefill=step / 2, decode=step / 2),
            cost_row(0, "ffn", "w64", batch_size),
        ]
    return score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.5)]]), cost_table(rows, (1, 4))


def test_of_equal_scores_the_fastest_batch_size_wins() -> None:
    solution = solve(ask(*two_batches(), TargetSettings(parameters="70"), SETTINGS))
    assert (solution.blocks, solution.batch_size) == (("kv4+w64",), 4)


def test_relative_targets_refer_to_the_parent_at_its_fastest_batch_size() -> None:
    scores, costs = two_batches()
    parent = parent_totals(scores, costs)
    assert parent == costs.totals(["kv8+w64"], 4).as_dict()
    bounds = resolve_bounds(TargetSettings(throughput="1.5x", memory="50%", latency="200ms"), parent)
    assert bounds == Bounds(
        throughput_tok_s=1.5 * parent["throughput_tok_s"], memory_bytes=parent["memory_bytes"] // 2, request_ms=200.0
    )


def test_the_parent_is_the_first_block_of_score_zero() -> None:
    scores, costs = two_batches()
    tied = score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.0)]])
    assert parent_totals(tied, costs) == parent_totals(scores, costs)
    with pytest.raises(PuzzleError, match=r"layers \[0\]: no block has a KL of 0"):
        parent_totals(score_table([[("kv4+w64", 0.5)]]), costs)


def test_bytes_beyond_the_solvers_precision_are_counted_exactly() -> None:
    """Of 100 GB, one block is a byte too large, and the solver alone would take it."""
    exact = 10**11
    rows = [
        cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0),
        cost_row(0, "ffn", "w64", 1),
        *(
            cost_row(0, "attention", name, 1, params=params)
            for name, params in (("kv8", 2 * exact), ("kv4", exact + 1), ("kv2", exact), ("kv1", exact - 1))
        ),
    ]
    scores = score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.1), ("kv2+w64", 0.2), ("kv1+w64", 0.3)]])
    solution = solve(ask(scores, cost_table(rows, (1,)), TargetSettings(parameters="100G"), SETTINGS))
    assert solution.blocks == ("kv2+w64",)


@pytest.mark.parametrize("exact", [10**11, 10**12])
def test_what_exact_integers_exclude_is_searched_again(exact: int) -> None:
    """HiGHS takes a sum that is one above the bound."""
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)]
    for layer in range(2):
        rows += [cost_row(layer, "ffn", "w64", 1)]
        rows += [cost_row(layer, "attention", f"kv{k}", 1, params=k * exact // 2) for k in (2, 1)]
    scores = score_table([[("kv2+w64", 0.0), ("kv1+w64", 0.1 + layer)] for layer in range(2)])
    target = TargetSettings(parameters=str(3 * exact // 2 - 1))
    assert solve(ask(scores, cost_table(rows, (1,)), target, SETTINGS)).blocks == ("kv1+w64", "kv1+w64")
    with pytest.raises(PuzzleError, match=r"^target.parameters: \d+ ?\S* asked; reachable .*; nearest: "):
        solve(ask(scores, cost_table(rows, (1,)), TargetSettings(parameters=str(exact - 1)), SETTINGS))


@pytest.mark.parametrize("never", [1e4, 1e8, 1e12, 1e15])
def test_a_score_for_never_leaves_the_others_exact(never: float) -> None:
    rng, names = np.random.default_rng(7), [f"kv{k}" for k in range(6, -1, -1)]
    rows, kl = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)], []
    for layer in range(16):
        rows += [cost_row(layer, "ffn", "w64", 1)]
        params, times = (np.sort(rng.uniform(1, 9, 7))[::-1] for _ in range(2))
        rows += [
            cost_row(layer, "attention", name, 1, params=int(1e6 * some), decode=float(time))
            for name, some, time in zip(names, params, times, strict=True)
        ]
        kl.append([0.0, *(1e-3 * np.sort(rng.exponential(size=5))).tolist()])
    costs, target = cost_table(rows, (1,)), TargetSettings(parameters="60%", latency="0.7x")
    alike = [list(zip((f"{name}+w64" for name in names), values, strict=False)) for values in kl]
    forbidden = [[*layer, ("kv0+w64", never)] for layer in alike]
    found = solve(ask(score_table(forbidden), costs, target, SETTINGS))
    assert found.score == pytest.approx(solve(ask(score_table(alike), costs, target, SETTINGS)).score, rel=1e-8)
    assert found.proof is not None
    assert found.proof.status == "optimal"


@pytest.mark.parametrize("seed", [0, 6, 8])
def test_where_many_tie_the_bound_may_be_a_rounding_above_the_best(seed: int) -> None:
    """A layer's blocks score the same, so that the relaxation's bound is the optimum, added up in another order."""
    rng = random.Random(seed)
    rows, kl = [cost_row(-1, "fixed", "", 1)], []
    for layer in range(rng.choice([14, 24])):
        score = rng.choice([0.1, 0.2, 0.3, 0.7]) * rng.choice([1, 1 / 3, 1 / 7])
        rows.append(cost_row(layer, "ffn", FFN, 1))
        for block in range(6):
            share = rng.randint(1, 100)
            params, weight_bytes, prefill = 300, 400, 500.0
            if block:
                params, weight_bytes = 3 * share + rng.randint(0, 9), 3 * (100 - share) + rng.randint(0, 9)
                prefill = float(rng.randint(1, 100))
            row = cost_row(layer, "attention", f"kv{block}", 1, params=params, kv=1, prefill=prefill)
            rows.append(replace(row, weight_bytes=weight_bytes))
        values = [0.0, *[score] * 4, 1.5 * score]
        kl.append([(f"kv{block}+{FFN}", value) for block, value in enumerate(values)])
    shares = (("parameters", 0.45, 0.6), ("disk", 0.38, 0.5), ("latency", 0.1, 0.14))
    target = TargetSettings.model_validate({name: f"{rng.uniform(low, high):.4f}x" for name, low, high in shares})
    settings = SearchSettings(margin=0, forbid={"all": "kv0"}, gap=rng.choice([0, 1e-6]))
    solution = solve(ask(score_table(kl), cost_table(rows, (1,)), target, settings))
    assert solution.score >= sum(layer[1][1] for layer in kl) - 1e-12
    assert solution.proof is not None
    assert solution.proof.status == "optimal"


@pytest.mark.parametrize("target", [{"throughput": "1e18 tok/s"}, {"latency": "1e-14ms"}, {"score": 1e-200}])
def test_targets_beyond_all_measure_are_out_of_reach(target: dict[str, Any]) -> None:
    with pytest.raises(PuzzleError, match=r"asked; reachable|each alone can be met"):
        solve(ask(*two_batches(), TargetSettings.model_validate({"parameters": "60", **target}), SETTINGS))


def test_a_byte_is_not_lost_to_rounding() -> None:
    scores, costs = two_batches()
    assert 0.29 * 100 < 29
    bounds = resolve_bounds(TargetSettings(parameters="29%"), parent_totals(scores, costs) | {"params": 100})
    assert bounds == {"params": 29}


def test_a_block_without_a_score_is_not_chosen() -> None:
    scores, costs = two_batches()
    without = replace(scores, rows=scores.rows[:1])
    assert list(architectures(without)) == [("kv8+w64",)]
    with pytest.raises(PuzzleError, match=r"target.parameters"):
        solve(ask(without, costs, TargetSettings(parameters="70"), SETTINGS))


def test_nothing_found_in_time_is_said() -> None:
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)]
    for layer in range(40):
        rows += [cost_row(layer, "ffn", "w64", 1)]
        rows += [cost_row(layer, "attention", f"kv{k}", 1, params=k * k * (7 + layer), decode=k / 7) for k in range(9)]
    scores = score_table([[(f"kv{k}+w64", (8 - k) * (1 + layer / 3)) for k in range(8, -1, -1)] for layer in range(40)])
    costs = cost_table(rows, (1,))
    target = TargetSettings(parameters="31%", throughput="1.7x")
    proof = solve(ask(scores, costs, target, SETTINGS)).proof
    assert proof is not None
    assert (proof.status, proof.gap) == ("optimal", pytest.approx(0, abs=1e-9))
    with pytest.raises(PuzzleError, match=r"search.time_limit_s: 0 s were over before any"):
        solve(ask(scores, costs, target, SearchSettings.model_construct(gap=1e-6, time_limit_s=0.0)))


def test_a_margin_makes_speed_and_time_bounds_tighter_and_leaves_sizes() -> None:
    parent = {"throughput_tok_s": 100.0, "prefill_ms": 50.0, "memory_bytes": 1000, "params": 10}
    target = TargetSettings(throughput="2x", time_to_first_token="22ms", memory="50%", parameters="80%")
    bounds = resolve_bounds(target, parent, margin=0.1)
    assert bounds["throughput_tok_s"] == pytest.approx(220.0)
    assert bounds["prefill_ms"] == pytest.approx(20.0)
    assert (bounds["memory_bytes"], bounds["params"]) == (500, 8)
