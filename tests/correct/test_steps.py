"""Steps on made-up worlds whose truth is known: sums of scores, and what pairs of blocks add."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import puzzle.correct.neighbours
from puzzle.artefacts import WORTH, CostTable, ScoreName, ScoreTable, Solution, WholeScore
from puzzle.correct.neighbours import around, matter, with_blocks
from puzzle.correct.steps import Steps
from puzzle.errors import PuzzleError
from puzzle.recipe import CorrectSettings, FurtherScenarioSettings, ScenarioSettings, SearchSettings, TargetSettings
from puzzle.runs import Run
from puzzle.search import excesses, pool, solve

Blocks = tuple[str, ...]
SEARCH = SearchSettings(margin=0.02)
OWN = "kv4+w64"
TWICE = {"throughput": "2x"}


class World:
    """In place of a true score: the table's sum, and what some pairs add."""

    score: ScoreName = "kl"

    def __init__(self, scores: ScoreTable, together: Callable[[int, str, int, str], float]) -> None:
        self._scores, self._together = scores, together
        self.seen: list[Blocks] = []

    def __call__(self, architectures: Sequence[Blocks]) -> list[float]:
        self.seen.extend(architectures)
        return [self.value(blocks) for blocks in architectures]

    def scores(self, architectures: Sequence[Blocks]) -> list[WholeScore]:
        return [
            WholeScore(kl=value, kl_se=0.0, lm_loss=0.0, top1_agreement=1.0, cosine=0.0)
            for value in self(architectures)
        ]

    def value(self, blocks: Blocks) -> float:
        pairs = combinations(enumerate(blocks), 2)
        return self._scores.total(blocks) + sum(self._together(i, one, j, other) for (i, one), (j, other) in pairs)


@pytest.fixture
def taken(pico_run: Run, tmp_path: Path, toy_scores: ScoreTable, toy_costs: CostTable) -> Callable[..., Steps]:
    """The steps of these settings, all others left out, taken in such a world."""

    def take(
        together: Callable[[int, str, int, str], float], speed: str = "2x", first: Solution | None = None, **wanted: int
    ) -> Steps:
        correct = CorrectSettings(**({"pool": 0, "depth": 0, "rounds": 0, "pairs": 0} | wanted))
        target = TargetSettings.model_validate({"throughput": speed})
        update = {"correct": correct, "target": target, "search": SEARCH}
        run = Run(tmp_path, pico_run.recipe.model_copy(update=update))
        first = first or solve(toy_scores, toy_costs, target, SEARCH)
        steps = Steps(run, toy_scores, toy_costs, first, World(toy_scores, together))  # type: ignore[arg-type]
        steps.take()
        return steps

    return take


def nothing(*_: object) -> float:
    return 0.0


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), speed=st.sampled_from(["1.3x", "2x", "3x"]))
def test_never_worse_than_the_search_and_always_within_the_bounds(
    taken: Callable[..., Steps], toy_scores: ScoreTable, toy_costs: CostTable, seed: int, speed: str
) -> None:
    names = sorted({row.block for row in toy_scores.rows})
    strength = np.random.default_rng(seed).normal(0, 0.5, (4, len(names), 4, len(names)))

    def together(i: int, one: str, j: int, other: str) -> float:
        return 0.0 if OWN in (one, other) else float(strength[i, names.index(one), j, names.index(other)])

    steps = taken(together, speed, pool=3, depth=1, rounds=1, pairs=3)
    first, *_ = steps.judged
    ranked = steps.ranked()
    value = {judged.blocks: judged.whole.kl for judged in steps.judged}
    assert ranked[-1].blocks == first.blocks
    enough = first.whole.kl - WORTH * abs(first.whole.kl)
    assert [each.blocks for each in ranked[:-1]] == sorted(
        (blocks for blocks in value if value[blocks] < enough), key=lambda blocks: value[blocks]
    )
    for solution in ranked:
        totals = toy_costs.totals(solution.blocks, solution.batch_size)
        assert not excesses(totals, ranked[-1].bounds)
        assert dict(totals.as_dict()) == pytest.approx(solution.predicted)
        assert solution.bounds == pytest.approx(ranked[-1].bounds)
        assert solution.score == pytest.approx(toy_scores.total(solution.blocks))
        assert (solution.proof is None) == (solution is not ranked[-1])
    after = [step.after for step in steps.steps]
    assert after == sorted(after, reverse=True)
    assert [step.before for step in steps.steps] == [first.whole.kl, *after[:-1]]


def test_where_sums_are_right_nothing_is_better(taken: Callable[..., Steps]) -> None:
    steps = taken(nothing, pool=3, depth=2, rounds=2, pairs=6)
    assert len(steps.ranked()) == 1
    assert [step.name for step in steps.steps] == ["pool", "depth", "rounds", "pairs"]
    assert all(step.after == step.before for step in steps.steps)


def test_the_pool_finds_what_is_nearly_as_good_as_a_sum_and_better_as_a_whole(taken: Callable[..., Steps]) -> None:
    chosen = taken(nothing).ranked()[0].blocks

    def together(i: int, one: str, j: int, other: str) -> float:
        return 0.5 * (one == chosen[i] and other == chosen[j])

    steps = taken(together, pool=4)
    assert steps.ranked()[0].blocks != chosen
    predicted, true = steps.pool()
    assert len(predicted) == len(true) == 4
    assert predicted == sorted(predicted)


@pytest.mark.parametrize(("share", "taken_over"), [(0.9 * WORTH, False), (1.1 * WORTH, True)])
def test_what_is_better_by_less_than_texts_differ_takes_no_place(
    taken: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch, share: float, taken_over: bool
) -> None:
    chosen = taken(nothing).ranked()[0].blocks
    value = World.value
    monkeypatch.setattr(World, "value", lambda self, blocks: 1.0 if blocks == chosen else value(self, blocks) + 2)
    other = taken(nothing, pool=2).judged[1].blocks
    monkeypatch.setattr(
        World, "value", lambda self, blocks: 1.0 if blocks == chosen else 1 - share if blocks == other else 2.0
    )
    assert [each.blocks for each in taken(nothing, pool=2).ranked()] == [*[other] * taken_over, chosen]


def test_a_round_leaves_the_blocks_that_do_not_go_together(taken: Callable[..., Steps]) -> None:
    def together(i: int, one: str, j: int, other: str) -> float:
        return 2.0 * ("none" in one and "none" in other)

    steps = taken(together, "3x", rounds=3)
    assert steps.steps[0].after < steps.steps[0].before


def test_pairs_are_measured_until_the_search_wants_no_others(
    taken: Callable[..., Steps], toy_scores: ScoreTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puzzle.correct.neighbours, "_SLACK", 0.5)
    rng = np.random.default_rng(3)
    names = sorted({row.block for row in toy_scores.rows})
    strength = rng.normal(0, 0.4, (4, len(names), 4, len(names)))

    def together(i: int, one: str, j: int, other: str) -> float:
        return 0.0 if OWN in (one, other) else float(strength[i, names.index(one), j, names.index(other)])

    steps = taken(together, pairs=12)
    known = [judged for judged in steps.judged if judged.step == "pairs"]
    assert len(known) >= 2
    assert steps.steps[0].after < steps.steps[0].before


def test_layers_are_removed_in_the_order_that_their_removal_makes(taken: Callable[..., Steps]) -> None:
    """Alone, all layers are missed alike; with layer 0 gone, layer 1 is missed much more."""

    def together(i: int, one: str, j: int, other: str) -> float:
        return 3.0 * ((i, j) == (0, 1) and one == other == "none+none")

    steps = taken(together, depth=2)
    dropped = [
        [layer for layer, block in enumerate(blocks) if block == "none+none"]
        for blocks in steps._true.seen  # type: ignore[attr-defined]
        if blocks.count("none+none") == blocks.count(OWN) == 2
    ]
    assert [0, 1] in dropped, "it was looked at"
    assert any(blocks.count("none+none") == 2 for blocks in steps._true.seen)  # type: ignore[attr-defined]
    centre = dropped[-1]
    assert centre != [0, 1]


def test_around_is_exact_for_the_centre_and_its_neighbours(toy_scores: ScoreTable) -> None:
    world = World(toy_scores, lambda i, one, j, other: 0.3 * (i + 1) * (j - i) * (one[:4] == other[:4]))
    centre = ("kv4+w64", "none+w32", "kv1+w64", "none+none")
    table = around(centre, toy_scores, frozenset((row.layer, row.block) for row in toy_scores.rows), world)
    zero = table.total(centre) - world.value(centre)
    for row in toy_scores.rows:
        blocks = with_blocks(centre, {row.layer: row.block})
        assert table.total(blocks) - world.value(blocks) == pytest.approx(zero)
    assert [table.parent_row(layer).block for layer in range(4)] == [OWN] * 4


def test_around_leaves_out_what_is_not_finite(toy_scores: ScoreTable) -> None:
    world = World(toy_scores, nothing)

    def evaluate(architectures: Sequence[Blocks]) -> list[float]:
        return [float("inf") if blocks[2] == "kv1+w64" else world.value(blocks) for blocks in architectures]

    table = around((OWN,) * 4, toy_scores, frozenset((row.layer, row.block) for row in toy_scores.rows), evaluate)
    left_out = {(row.layer, row.block) for row in toy_scores.rows} - {(row.layer, row.block) for row in table.rows}
    assert left_out == {(2, "kv1+w64")}


def test_what_does_not_matter_is_not_scored_and_looks_no_better_than_it_is(toy_scores: ScoreTable) -> None:
    world = World(toy_scores, lambda i, one, j, other: 0.5 * (one != OWN and other != OWN))
    centre = ("kv1+w64", "none+w32", OWN, OWN)
    some = frozenset({(0, "kv2+w64"), (1, "none+w64"), *enumerate(centre)})
    table = around(centre, toy_scores, some, world)
    assert len(world.seen) == len(some | set(enumerate((OWN,) * 4)))
    assert len(table.rows) == len(toy_scores.rows)
    assert table.value(0, "kv2+w64") == toy_scores.value(0, "kv2+w64") + 0.5
    assert table.value(0, "none+none") == toy_scores.value(0, "none+none") + 0.5
    assert table.value(2, "none+none") == toy_scores.value(2, "none+none")


@pytest.mark.parametrize("speed", ["1.3x", "2x", "3x"])
def test_what_matters_is_what_nearly_as_good_architectures_take(
    toy_scores: ScoreTable, toy_costs: CostTable, speed: str
) -> None:
    target = TargetSettings.model_validate({"throughput": speed})
    found = matter(toy_scores, toy_costs, first := solve(toy_scores, toy_costs, target, SEARCH), "kl")
    assert set(enumerate(first.blocks)) <= found
    assert len(found) < len(toy_scores.rows)
    near = {place for each in pool(toy_scores, toy_costs, target, SEARCH, 6, 1) for place in enumerate(each.blocks)}
    assert len(near - found) <= len(near) / 4


def test_in_deep_models_a_layers_share_says_what_matters(
    toy_scores: ScoreTable, toy_costs: CostTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = solve(toy_scores, toy_costs, TargetSettings.model_validate({"throughput": "1.3x"}), SEARCH)

    def left(slack: float, layer_slack: float) -> int:
        monkeypatch.setattr(puzzle.correct.neighbours, "_SLACK", slack)
        monkeypatch.setattr(puzzle.correct.neighbours, "_LAYER_SLACK", layer_slack)
        return len(matter(toy_scores, toy_costs, first, "kl"))

    assert left(10.0, 0.4) == left(0.1, 10.0) < left(10.0, 10.0)


def test_a_solution_of_a_fitted_table_sets_the_pace_for_the_others(
    taken: Callable[..., Steps], toy_scores: ScoreTable, toy_costs: CostTable
) -> None:
    """Measured, all is 20 % slower than the table says; the first is fast enough all the same."""
    slower = replace(toy_costs, rows=tuple(replace(row, decode_ms=1.2 * row.decode_ms) for row in toy_costs.rows))
    target = TargetSettings.model_validate({"throughput": "2x"})
    asked = solve(toy_scores, toy_costs, target, SEARCH).asked
    first = replace(
        solve(toy_scores, slower, TargetSettings.model_validate({"throughput": "2.6x"}), SEARCH), asked=asked
    )
    found = taken(nothing, first=first, pool=4).ranked()
    pace = toy_costs.totals(first.blocks, first.batch_size).throughput_tok_s
    assert pace > 1.1 * asked["throughput_tok_s"]
    others = [judged.blocks for judged in taken(nothing, first=first, pool=4).judged]
    assert len(others) > 3
    assert all(toy_costs.totals(blocks, 2).throughput_tok_s >= pace * (1 - 1e-7) for blocks in others)
    assert found[-1] == first


def test_further_scenarios_bind_all_that_is_proposed(
    pico_run: Run, tmp_path: Path, toy_scores: ScoreTable, toy_costs: CostTable
) -> None:
    heavy = replace(toy_costs, rows=tuple(replace(row, decode_ms=row.decode_ms**2) for row in toy_costs.rows))
    other = FurtherScenarioSettings(scenario=ScenarioSettings(), target=TargetSettings.model_validate(TWICE))
    target = TargetSettings.model_validate({"throughput": "1.5x"})
    correct = CorrectSettings(pool=4, rounds=1)
    update = {"correct": correct, "target": target, "search": SEARCH, "scenarios": [other]}
    run = Run(tmp_path, pico_run.recipe.model_copy(update=update))
    first = solve(toy_scores, toy_costs, target, SEARCH, further=[(heavy, other.target)])
    world: Any = World(toy_scores, lambda i, one, j, other: 0.5 * (one == other))
    steps = Steps(run, toy_scores, toy_costs, first, world, [heavy])
    steps.take()
    assert len(steps.judged) > 3
    for blocks in (judged.blocks for judged in steps.judged):
        assert not excesses(heavy.totals(blocks, 2), first.further[0].bounds)


def test_a_bound_on_the_score_and_costs_bounded_elsewhere(
    pico_run: Run, tmp_path: Path, toy_scores: ScoreTable, toy_costs: CostTable
) -> None:
    """Only the further scenario bounds costs, with the margin that the search kept there."""
    other = FurtherScenarioSettings(scenario=ScenarioSettings(), target=TargetSettings.model_validate(TWICE))
    target = TargetSettings.model_validate({"score": 100.0})
    update = {"correct": CorrectSettings(pool=4), "target": target, "search": SEARCH, "scenarios": [other]}
    recipe = pico_run.recipe.model_copy(update=update)
    assert recipe.corrected
    assert not recipe.model_copy(update={"scenarios": []}).corrected
    first = solve(toy_scores, toy_costs, target, SEARCH, further=[(toy_costs, other.target)])
    world: Any = World(toy_scores, nothing)
    steps = Steps(Run(tmp_path, recipe), toy_scores, toy_costs, first, world, [toy_costs])
    steps.take()
    assert len(steps.judged) > 3
    for solution in steps.ranked():
        assert "memory_bytes" not in solution.asked
        assert solution.further[0].asked == first.further[0].asked
        assert solution.further[0].bounds == first.further[0].bounds
        assert not excesses(toy_costs.totals(solution.blocks, 2), first.further[0].bounds)


@pytest.mark.parametrize("lost", [lambda blocks: True, lambda blocks: blocks[1] == OWN])
def test_where_nothing_is_finite_nothing_is_proposed(
    taken: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch, lost: Callable[[Blocks], bool]
) -> None:
    value = World.value
    monkeypatch.setattr(World, "value", lambda self, blocks: float("inf") if lost(blocks) else value(self, blocks))
    steps = taken(nothing, "3x", pool=3, depth=1, rounds=1, pairs=4)
    assert [step.name for step in steps.steps] == ["pool", "depth", "rounds", "pairs"]
    assert {judged.step for judged in steps.judged} <= {"search", "pool", "depth"}


def test_where_time_is_over_what_is_known_stands(taken: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch) -> None:
    def over(*_: Any, **__: Any) -> list[Solution]:
        raise PuzzleError("search.time_limit_s: over")

    monkeypatch.setattr("puzzle.correct.steps.pool", over)
    assert len(taken(nothing, pool=3, rounds=1, pairs=2).ranked()) == 1
