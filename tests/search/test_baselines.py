"""Baselines: within the bounds by the raw tables, never better than the program, and each what it says it is."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import architectures, ask, cost_row, cost_table, score_table, within

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import BASELINES, solve, solve_baseline
from puzzle.units import Amount

EXACT = SearchSettings(gap=0, margin=0)
MAY_FAIL = {"greedy", "one-block", "depth"}
ATTENTION, FFN = ("kv2", "kv1", "none"), ("w4", "w2", "none")
BLOCKS = [f"{attention}+{ffn}" for attention, ffn in itertools.product(ATTENTION, FFN)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[ScoreTable, CostTable, TargetSettings]:
    """1-3 layers of nine blocks, empty ones among them, at one or two batch sizes, and bounds that can be met."""
    batch_sizes = draw(st.sampled_from([[1], [1, 4]]))
    small = st.integers(0, 9)
    rows = [cost_row(-1, "fixed", "", size, params=3, prefill=1.0, decode=0.5) for size in batch_sizes]
    scores = []
    for layer in range(draw(st.integers(1, 3))):
        kl = [0, *draw(st.lists(st.integers(1, 30), min_size=8, max_size=8))]
        scores.append([(block, value / 8) for block, value in zip(BLOCKS, kl, strict=True)])
        for part, names in (("attention", ATTENTION), ("ffn", FFN)):
            for name in names:
                sizes: Any = {} if name == "none" else {"params": draw(small), "kv": draw(small) * (part != "ffn")}
                for size in batch_sizes:
                    times: Any = {} if name == "none" else {"prefill": draw(small) / 4, "decode": draw(small) / 4}
                    rows.append(cost_row(layer, part, name, size, **sizes, **times))
    costs = cost_table(rows, batch_sizes)
    reached = costs.totals([draw(st.sampled_from(BLOCKS)) for _ in scores], draw(st.sampled_from(batch_sizes)))
    bounds = {"latency": f"{reached.request_ms}ms", "memory": f"{reached.memory_bytes}B"}
    kept = draw(st.sampled_from([["latency"], ["memory"], ["latency", "memory"]]))
    return score_table(scores), costs, TargetSettings.model_validate({name: bounds[name] for name in kept})


def feasible(scores: ScoreTable, costs: CostTable, solution: Solution) -> list[tuple[str, ...]]:
    """Every architecture that is within the solution's bounds at some batch size."""
    return [
        blocks
        for blocks in architectures(scores)
        if any(within(costs.totals(blocks, size), solution.bounds) for size in costs.batch_sizes)
    ]


RULES: dict[str, tuple[dict[str, Any], Callable[[Sequence[str]], bool]]] = {
    "none": ({}, lambda blocks: True),
    "fix": ({"fix": {"0": "parent"}}, lambda blocks: blocks[0] == BLOCKS[0]),
    "forbid": ({"forbid": {"all": ["none+none", "w2"]}}, lambda blocks: not {"none+none", "kv1+w2"} & set(blocks)),
    "equal": ({"equal": 2}, lambda blocks: blocks[:1] == blocks[1:2] or len(blocks) == 1),
    "score": ({}, lambda blocks: True),
}


@pytest.mark.parametrize("name", BASELINES)
@given(problem=problems(), seed=st.integers(0, 3), rule=st.sampled_from(sorted(RULES)))
@settings(max_examples=20, deadline=None)
def test_within_bounds_and_rules_and_never_better_than_the_program(
    name: str, problem: tuple[ScoreTable, CostTable, TargetSettings], seed: int, rule: str
) -> None:
    scores, costs, target = problem
    given, keeps = RULES[rule]
    if rule == "score":
        target = target.model_copy(update={"score": Amount(4.0, relative=False, text="4")})
    chosen = EXACT.model_copy(update=given)
    try:
        best = solve(ask(scores, costs, target, chosen))
    except PuzzleError:
        with pytest.raises(PuzzleError):
            solve_baseline(ask(scores, costs, target, chosen), name, seed)
        return
    try:
        found = solve_baseline(ask(scores, costs, target, chosen), name, seed)
    except PuzzleError:
        assert name in MAY_FAIL or rule == "score"  # which those that look at no score may miss
        return
    totals = costs.totals(found.blocks, found.batch_size)
    assert within(totals, found.bounds)
    assert found.bounds == best.bounds
    assert found.predicted == totals.as_dict()
    assert found.score == scores.total(found.blocks)
    assert best.score - 1e-9 <= found.score <= (4.0 if rule == "score" else math.inf)
    assert keeps(found.blocks)
    assert found.proof is None
    assert found == solve_baseline(ask(scores, costs, target, chosen), name, seed)


@given(problems())
@settings(max_examples=15, deadline=None)
def test_max_parameters_has_the_most(problem: tuple[ScoreTable, CostTable, TargetSettings]) -> None:
    scores, costs, _ = problem
    found = solve_baseline(ask(*problem, EXACT), "max-parameters")
    params = [costs.totals(blocks, costs.batch_sizes[0]).cost.params for blocks in feasible(scores, costs, found)]
    assert found.predicted["params"] == max(params)


@st.composite
def served(draw: st.DrawFn) -> tuple[ScoreTable, CostTable, TargetSettings, list[tuple[CostTable, TargetSettings]]]:
    """The same blocks in one or two further scenarios: other times, batch sizes, and bounds that some have there."""
    scores, costs, target = draw(problems())
    further = []
    for _ in range(draw(st.integers(1, 2))):
        sizes, factor = draw(st.sampled_from([[2], [2, 8]])), draw(st.integers(1, 4))
        rows = [
            replace(row, batch_size=size, decode_ms=row.prefill_ms * factor, prefill_ms=row.decode_ms + row.params / 8)
            for size in sizes
            for row in costs.rows
            if row.batch_size == costs.batch_sizes[0]
        ]
        there = cost_table(rows, sizes, generated_tokens=3)
        reached = there.totals([draw(st.sampled_from(BLOCKS)) for _ in range(scores.num_layers)], 2)
        asked = {"memory": f"{reached.memory_bytes}B", "time_to_first_token": f"{reached.cost.prefill_ms}ms"}
        kept = draw(st.sampled_from([["memory"], ["time_to_first_token"], [*asked]]))
        further.append((there, TargetSettings.model_validate({name: asked[name] for name in kept})))
    return scores, costs, target, further


@pytest.mark.parametrize("name", BASELINES)
@given(problem=served(), seed=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_within_the_bounds_of_every_scenario(name: str, problem: Any, seed: int) -> None:
    *tables, further = problem
    try:
        best = solve(ask(*tables, EXACT, further=further))
    except PuzzleError:
        with pytest.raises(PuzzleError):
            solve_baseline(ask(*tables, EXACT, further=further), name, seed=seed)
        return
    try:
        found = solve_baseline(ask(*tables, EXACT, further=further), name, seed=seed)
    except PuzzleError:
        assert name in MAY_FAIL
        return
    scores, costs, _ = tables
    assert within(costs.totals(found.blocks, found.batch_size), found.bounds)
    for (there, _), serving, its in zip(further, found.further, best.further, strict=True):
        totals = there.totals(found.blocks, serving.batch_size)
        assert serving.predicted == totals.as_dict()
        assert within(totals, serving.bounds)
        assert (serving.asked, serving.bounds, serving.parent) == (its.asked, its.bounds, its.parent)
    assert best.score - 1e-9 <= found.score == scores.total(found.blocks)


def test_a_further_scenario_decides() -> None:
    """There prefills are bounded, which the main scenario says nothing of: no more than half of the layers stay."""
    scores, costs = _ladder([(0, 1, 2), (0, 1, 3)])
    there = replace(costs, rows=tuple(replace(row, prefill_ms=row.decode_ms, decode_ms=1.0) for row in costs.rows))
    further = [(there, TargetSettings.model_validate({"time_to_first_token": "4ms"}))]
    for name in BASELINES:
        free = solve_baseline(ask(scores, costs, _bound(8), EXACT), name)
        found = solve_baseline(ask(scores, costs, _bound(8), EXACT, further=further), name)
        assert there.totals(found.blocks, 1).cost.prefill_ms <= 4
        assert name == "random" or there.totals(free.blocks, 1).cost.prefill_ms == 8
        assert [str(serving.asked["prefill_ms"]) for serving in found.further] == ["4.0"]


@given(problem=problems())
@settings(max_examples=15, deadline=None)
def test_one_block_drops_as_few_layers_as_it_takes_and_makes_the_others_alike(
    problem: tuple[ScoreTable, CostTable, TargetSettings],
) -> None:
    scores, costs, _ = problem
    within_bounds = feasible(scores, costs, solve(ask(*problem, EXACT)))
    order = sorted(range(scores.num_layers), key=lambda layer: scores.value(layer, "none+none"))
    for count in range(scores.num_layers):
        alike = [
            scores.total(blocks)
            for blocks in within_bounds
            if len({blocks[layer] for layer in order[count:]}) == 1
            and "none+none" not in {blocks[layer] for layer in order[count:]}
            and all(blocks[layer] == "none+none" for layer in order[:count])
        ]
        if alike:
            assert solve_baseline(ask(*problem, EXACT), "one-block").score == pytest.approx(min(alike))
            return
    with pytest.raises(PuzzleError, match="baseline one-block: it finds nothing within the target"):
        solve_baseline(ask(*problem, EXACT), "one-block")


def _ladder(scores: Sequence[Sequence[float]]) -> tuple[ScoreTable, CostTable]:
    """Layers of blocks that cost 4, 2 and 0 ms to decode."""
    blocks = ("kv2+w4", "kv1+w4", "none+none")
    table = score_table([list(zip(blocks, values, strict=True)) for values in scores])
    rows = [cost_row(-1, "fixed", "", 1, params=1)]
    for layer in range(len(scores)):
        rows += [cost_row(layer, "ffn", ffn, 1) for ffn in ("w4", "none")]
        rows += [
            cost_row(layer, "attention", name, 1, params=int(decode), decode=decode)
            for name, decode in (("kv2", 4.0), ("kv1", 2.0), ("none", 0.0))
        ]
    return table, cost_table(rows, [1], generated_tokens=2)


def _bound(latency_ms: float) -> TargetSettings:
    return TargetSettings.model_validate({"latency": f"{latency_ms}ms"})


def test_greedy_hands_on_what_is_left_to_the_harder_layers() -> None:
    tables = _ladder([(0, 5, 9), (0, 1, 2), (0, 3, 6)])
    # 2.5 ms a layer. Layer 1 is the easiest: kv1, 0.5 left. Layer 2: kv1, 1 left. Layer 0 has 3.5 ms: kv1, not its own.
    assert solve_baseline(ask(*tables, _bound(7.5), EXACT), "greedy").blocks == ("kv1+w4",) * 3
    # 3 ms a layer: layer 2 has 4 ms and keeps its own, the hardest has what is left.
    assert solve_baseline(ask(*tables, _bound(9), EXACT), "greedy").blocks == ("kv1+w4", "kv1+w4", "kv2+w4")
    # The program gives the easiest layer up, which greedy never does.
    assert solve(ask(*tables, _bound(8), EXACT)).blocks == ("kv2+w4", "none+none", "kv2+w4")


def test_depth_drops_as_few_as_it_takes_the_least_missed_first() -> None:
    tables = _ladder([(0, 1, 7), (0, 1, 2), (0, 1, 4)])
    assert solve_baseline(ask(*tables, _bound(8), EXACT), "depth").blocks == ("kv2+w4", "none+none", "kv2+w4")
    assert solve_baseline(ask(*tables, _bound(4), EXACT), "depth").blocks == ("kv2+w4", "none+none", "none+none")
    influenced = solve_baseline(ask(*tables, _bound(4), EXACT, influence=lambda: [0.1, 0.3, 0.2]), "depth")
    assert influenced.blocks == ("none+none", "kv2+w4", "none+none")


def test_random_draws_everything_where_no_bound_binds() -> None:
    tables = _ladder([(0, 5, 9), (0, 1, 2)])
    drawn = {solve_baseline(ask(*tables, _bound(100), EXACT), "random", seed=seed).blocks for seed in range(80)}
    assert len(drawn) == 9


def test_what_a_person_can_get_wrong() -> None:
    tables = _ladder([(0, 1, 2)])
    with pytest.raises(PuzzleError, match="baseline 'greed' is unknown; use one of random, greedy, "):
        solve_baseline(ask(*tables, _bound(8), EXACT), "greed")
    with pytest.raises(PuzzleError, match="target: no cost is bounded"):
        solve_baseline(ask(*tables, TargetSettings(), EXACT), "greedy")
