"""The solver against enumeration (law 8)."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import (
    BOUNDS,
    architectures,
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
from puzzle.search import evaluate_blocks, parent_totals, resolve_bounds, solve
from puzzle.search.bounds import excesses
from puzzle.search.core import minimise_core
from puzzle.search.exact import Instance, best_architecture
from puzzle.search.explain import best_value
from puzzle.search.highs import Outcome, Relaxation, minimise, relax
from puzzle.search.problem import Program, build_program

SETTINGS = SearchSettings(gap=1e-9, margin=0.0)
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
    solution = best_architecture(Instance.of(scores, costs), bounds, SETTINGS)
    if not feasible:
        assert solution is None
        return
    assert solution is not None
    assert solution.score == pytest.approx(min(feasible), abs=1e-9)
    score, totals = evaluate_blocks(scores, costs, solution.blocks, solution.batch_size)
    assert (score, totals.as_dict()) == (solution.score, solution.predicted)
    assert within(totals, bounds)
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
    assert solution.proof.bound == pytest.approx(min(feasible), abs=1e-6)


@examples
@given(bounded(), st.sampled_from(BOUNDS))
def test_the_best_value_is_the_best_of_all_architectures(case: tuple[ScoreTable, CostTable, Bounds], name: str) -> None:
    scores, costs, bounds = case
    bounds = replace(bounds, **{name: None})
    values = [totals.as_dict()[name] for _, totals in everything(scores, costs) if within(totals, bounds)]
    best = best_value(Instance.of(scores, costs), name, bounds, SETTINGS)
    if not values:
        assert best is None
        return
    assert best == pytest.approx(max(values) if name == "throughput_tok_s" else min(values), rel=1e-6)


@examples
@given(bounded())
def test_a_check_of_bounds_agrees_with_their_meaning(case: tuple[ScoreTable, CostTable, Bounds]) -> None:
    scores, costs, bounds = case
    for _, totals in everything(scores, costs):
        assert (not excesses(totals, bounds)) == within(totals, bounds)


@settings(max_examples=25, deadline=None)
@given(bounded())
def test_the_same_search_gives_the_same_architecture(case: tuple[ScoreTable, CostTable, Bounds]) -> None:
    scores, costs, bounds = case
    first, second = (best_architecture(Instance.of(scores, costs), bounds, SETTINGS) for _ in range(2))
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
    solution = solve(*two_batches(), TargetSettings(parameters="70"), SETTINGS)
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
    with pytest.raises(PuzzleError, match="layer 0: no block has a KL of 0"):
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
    solution = solve(scores, cost_table(rows, (1,)), TargetSettings(parameters="100G"), SETTINGS)
    assert solution.blocks == ("kv2+w64",)


def test_a_byte_is_not_lost_to_rounding() -> None:
    scores, costs = two_batches()
    assert 0.29 * 100 < 29
    assert resolve_bounds(TargetSettings(parameters="29%"), parent_totals(scores, costs) | {"params": 100}).params == 29


def test_dominated_blocks_are_left_out_and_of_equals_the_fastest_stays() -> None:
    names = {
        "kv8": (100, 5.0, 0.0),
        "kv4": (50, 3.0, 0.5),
        "kv3": (50, 2.0, 0.5),
        "kv2": (50, 2.0, 0.5),
        "kv1": (60, 1, 0.6),
    }
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0), cost_row(0, "ffn", "w64", 1)]
    rows += [cost_row(0, "attention", name, 1, params=p, decode=decode) for name, (p, decode, _) in names.items()]
    scores = score_table([[(f"{name}+w64", kl) for name, (_, _, kl) in names.items()]])
    (choices,) = Instance.of(scores, cost_table(rows, (1,))).choices

    def kept(bounds: Bounds) -> list[str]:
        return [choices.blocks[entry] for entry in build_program(choices, choices.scores, bounds).entries]

    assert kept(Bounds(params=70)) == ["kv8+w64", "kv3+w64"]
    assert kept(Bounds(params=70, decode_ms=3.0)) == ["kv8+w64", "kv3+w64", "kv1+w64"]


def test_a_block_without_a_score_is_not_chosen() -> None:
    scores, costs = two_batches()
    without = replace(scores, rows=scores.rows[:1])
    assert list(architectures(without)) == [("kv8+w64",)]
    with pytest.raises(PuzzleError, match=r"target.parameters"):
        solve(without, costs, TargetSettings(parameters="70"), SETTINGS)


def test_nothing_found_in_time_is_said() -> None:
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)]
    for layer in range(40):
        rows += [cost_row(layer, "ffn", "w64", 1)]
        rows += [cost_row(layer, "attention", f"kv{k}", 1, params=k * k * (7 + layer), decode=k / 7) for k in range(9)]
    scores = score_table([[(f"kv{k}+w64", (8 - k) * (1 + layer / 3)) for k in range(8, -1, -1)] for layer in range(40)])
    costs = cost_table(rows, (1,))
    target = TargetSettings(parameters="31%", throughput="1.7x")
    proof = solve(scores, costs, target, SETTINGS).proof
    assert proof is not None
    assert (proof.status, proof.gap) == ("optimal", pytest.approx(0, abs=1e-9))
    with pytest.raises(PuzzleError, match=r"search.time_limit_s: 0 s were over before any"):
        solve(scores, costs, target, SearchSettings.model_construct(gap=1e-6, time_limit_s=0.0))


def test_a_solution_without_a_proof_is_not_called_optimal(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(program: Program, *, gap: float, time_limit_s: float) -> Outcome:
        return replace(minimise(program, gap=gap, time_limit_s=time_limit_s), status="feasible", bound=0.125)

    monkeypatch.setattr("puzzle.search.core.minimise", hurried)
    monkeypatch.setattr("puzzle.search.core._LABELS", (0, 0))

    def loose(program: Program) -> Relaxation:
        return replace(relax(program), bound=0.0)

    monkeypatch.setattr("puzzle.search.exact.relax", loose)
    proof = solve(*two_batches(), TargetSettings(parameters="70"), SETTINGS).proof
    assert proof is not None
    assert (proof.status, proof.bound, proof.gap) == ("feasible", 0.125, 0.75)


def test_the_search_ends_when_no_other_batch_size_can_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def counted(program: Program, relaxation: Relaxation, *, gap: float, time_limit_s: float) -> Outcome:
        solved.append(program)
        return minimise_core(program, relaxation, gap=gap, time_limit_s=time_limit_s)

    monkeypatch.setattr("puzzle.search.exact.minimise_core", counted)
    solution = best_architecture(Instance.of(*two_batches()), Bounds(request_ms=57), SETTINGS)
    assert solution is not None
    assert (solution.blocks, solution.batch_size) == (("kv8+w64",), 1)
    assert len(solved) == 1


def test_a_margin_makes_speed_and_time_bounds_tighter_and_leaves_sizes() -> None:
    parent = {"throughput_tok_s": 100.0, "prefill_ms": 50.0, "memory_bytes": 1000, "params": 10}
    target = TargetSettings(throughput="2x", time_to_first_token="22ms", memory="50%", parameters="80%")
    bounds = resolve_bounds(target, parent, margin=0.1)
    assert bounds.throughput_tok_s == pytest.approx(220.0)
    assert bounds.prefill_ms == pytest.approx(20.0)
    assert (bounds.memory_bytes, bounds.params) == (500, 8)
