"""A bound on the score, and what is made best under it, against enumeration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import SETTINGS, ask, everything, within
from tests.search.test_solve import bounded, two_batches

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import SETTINGS as QUANTITY_OF
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import solve
from puzzle.search.exact import best
from puzzle.search.tables import Objective


@settings(max_examples=50, deadline=None)
@given(bounded(), st.sampled_from([*QUANTITY_OF]), st.sampled_from([0.125, 0.5, 1.0, 2.0]))
def test_the_objective_is_best_within_all_bounds(
    case: tuple[ScoreTable, CostTable, Bounds], setting: str, most: float
) -> None:
    scores, costs, bounds = case
    name = QUANTITY_OF[setting].key
    values = [
        score if name == "score" else totals.as_dict()[name]
        for score, totals in everything(scores, costs)
        if within(totals, bounds) and score <= most
    ]
    solution = best(ask(scores, costs), [bounds | {"score": most}], objective=Objective(name))
    if not values:
        assert solution is None
        return
    assert solution is not None
    expected = max(values) if setting == "throughput" else min(values)
    assert Objective(name).reached(solution) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert solution.score <= most
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
    assert solution.proof.bound == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_fastest_child_that_is_good_enough() -> None:
    settings = SETTINGS.model_copy(update={"objective": "throughput"})
    for most, block in ((0.4, "kv8+w64"), (0.5, "kv4+w64")):
        solution = solve(ask(*two_batches(), TargetSettings(score=most), settings))
        assert (solution.blocks, solution.batch_size, solution.bounds["score"]) == ((block,), 4, most)


@pytest.mark.parametrize(
    ("target", "settings", "line"),
    [
        (
            {"memory": "50%"},
            {"objective": "throughput"},
            "search.objective: throughput alone would give up all quality; set target.score, the highest sum of "
            "scores that you accept",
        ),
        (
            {"score": 0.25, "parameters": "70"},
            {},
            "target.parameters: 70, target.score: 0.25: each alone can be met, together they cannot; nearest with the "
            "other bounds kept: target.parameters: 110",
        ),
        (
            {"score": 0.25, "parameters": "1k"},
            {"fix": {"0": "kv4"}},
            "target.score: 0.25 asked; reachable 0 (parent) to 0.5; nearest with the other bounds kept: 0.5",
        ),
        (
            {"score": 0.25},
            {},
            "target.score: alone it is met best by the parent itself; bound a cost too, or set search.objective",
        ),
    ],
)
def test_the_line(target: dict[str, object], settings: dict[str, object], line: str) -> None:
    with pytest.raises(PuzzleError) as raised:
        solve(ask(*two_batches(), TargetSettings(**target), SearchSettings(**settings)))
    assert str(raised.value) == line
