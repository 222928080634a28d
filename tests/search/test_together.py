"""All demands in one search, against enumeration: the other files take them one by one."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import SETTINGS, architectures, ask, within
from tests.search.test_constraints import _is_equal, _means
from tests.search.test_scenarios import two_scenarios

from puzzle.artefacts import Bounds, CostTable, ScoreTable, Totals
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.exact import best
from puzzle.search.tables import Objective

Case = tuple[ScoreTable, CostTable, Bounds, CostTable, Bounds]


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """Some of `fix`, `forbid` and `equal`."""
    names, every = st.sampled_from(["kv8", "kv7", "parent"]), {"fix", "forbid", "equal"}
    given: dict[str, Any] = {
        "fix": {"0": [draw(names), draw(names)]},  # which every layer has
        "forbid": {"all": draw(st.sampled_from(["kv8", "kv7"]))},
        "equal": draw(st.sampled_from(["all", 2])),
    }
    return {name: given[name] for name in draw(st.sets(st.sampled_from(sorted(every)), max_size=2))}


def keeps(blocks: Sequence[str], given: dict[str, Any]) -> bool:
    """The meaning of the rules, written a second time."""
    fixed = any(_means(name, blocks[0]) for name in given.get("fix", {}).get("0", ["*+w64"]))
    forbidden = "forbid" in given and any(_means(given["forbid"]["all"], block) for block in blocks)
    return fixed and not forbidden and _is_equal(tuple(blocks), given.get("equal"))


def served(case: Case, blocks: tuple[str, ...]) -> Iterator[tuple[Totals, Totals]]:
    """Totals in both scenarios at every combination of batch sizes that is within both scenarios' bounds."""
    _, costs, bounds, further, there = case
    for one, other in itertools.product(costs.batch_sizes, further.batch_sizes):
        totals = costs.totals(blocks, one), further.totals(blocks, other)
        if within(totals[0], bounds) and within(totals[1], there):
            yield totals


@settings(max_examples=60, deadline=None)
@given(two_scenarios(), rules(), st.data())
def test_all_demands_at_once(case: Case, given: dict[str, Any], data: st.DataObject) -> None:
    scores, costs, bounds, further, there = case
    most = data.draw(st.sampled_from([None, 0.5, 1.0]))
    objective = data.draw(
        st.sampled_from([Objective(), Objective("params"), Objective("decode_ms", 1), Objective("throughput_tok_s")])
    )

    def value(blocks: tuple[str, ...], totals: tuple[Totals, Totals]) -> float:
        if objective.key == "score":
            return scores.total(blocks)
        its: float = totals[objective.scenario].as_dict()[objective.key]
        return -its if objective.key == "throughput_tok_s" else its

    found = {
        blocks: min(value(blocks, totals) for totals in served(case, blocks))
        for blocks in architectures(scores)
        if keeps(blocks, given) and (most is None or scores.total(blocks) <= most) and any(served(case, blocks))
    }
    others = data.draw(st.sampled_from([[], sorted(found, key=lambda blocks: found[blocks])[:1]]))
    differing = data.draw(st.integers(1, scores.num_layers))
    values = [
        found[blocks]
        for blocks in found
        if all(sum(a != b for a, b in zip(blocks, other, strict=True)) >= differing for other in others)
    ]
    asked, solution = SearchSettings.model_validate(SETTINGS.model_dump() | given), None
    with suppress(PuzzleError):  # rules that leave no block
        tables = ask(scores, costs, None, asked, further=[(further, TargetSettings())])
        limits = bounds | ({} if most is None else {"score": most})
        solution = best(tables, [limits, there], objective=objective, others=others, differing=differing)
    if solution is None:
        assert not values
        return
    assert values
    (serving,) = solution.further
    totals = costs.totals(solution.blocks, solution.batch_size), further.totals(solution.blocks, serving.batch_size)
    assert value(solution.blocks, totals) == pytest.approx(min(values), rel=1e-6, abs=1e-9)
    assert totals in list(served(case, solution.blocks))
    assert keeps(solution.blocks, given)
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
