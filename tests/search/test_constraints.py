"""What a person may demand of layers, against enumeration; and what a person can get wrong in it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.conftest import SETTINGS, architectures, ask, cost_row, cost_table, score_table, within
from tests.search.test_solve import bounded

from puzzle.artefacts import Bounds, CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe, SearchSettings, TargetSettings
from puzzle.search import solve
from puzzle.search.exact import best


@settings(max_examples=50, deadline=None)
@given(bounded(), st.data())
def test_constraints_are_kept_to_and_cost_nothing_more(
    case: tuple[ScoreTable, CostTable, Bounds], data: st.DataObject
) -> None:
    scores, costs, bounds = case
    last = scores.num_layers - 1
    names = st.sampled_from(["kv8", "kv7", "kv6+w64", "*+w64", "parent"])
    fix = data.draw(st.dictionaries(st.sampled_from(["0", f"0-{last}", "last:1"]), names, max_size=1))
    forbid = data.draw(st.dictionaries(st.sampled_from(["all", f"{last}", "first:1"]), names, max_size=2))
    equal = data.draw(st.sampled_from([None, "all", 2, [f"0-{last}"]]))
    rules = SETTINGS.model_validate(SETTINGS.model_dump() | {"fix": fix, "forbid": forbid, "equal": equal})
    found = [
        scores.total(blocks)
        for blocks in architectures(scores)
        if any(within(costs.totals(blocks, b), bounds) for b in costs.batch_sizes)
        and all(_means(pattern, blocks[layer]) for span, pattern in fix.items() for layer in _span(span, last))
        and not any(_means(pattern, blocks[layer]) for span, pattern in forbid.items() for layer in _span(span, last))
        and _is_equal(blocks, equal)
    ]
    try:
        solution = best(ask(scores, costs, None, rules), [bounds])
    except PuzzleError as error:
        if "is no block" in str(error):
            return
        solution = None
    if solution is None:
        assert not found
        return
    assert solution.score == pytest.approx(min(found), abs=1e-9)
    assert _is_equal(solution.blocks, equal)


def _span(span: str, last: int) -> range:
    """The meaning of a span, for the few that are used here."""
    return {"first:1": range(1), "0": range(1), "last:1": range(last, last + 1), str(last): range(last, last + 1)}.get(
        span, range(last + 1)
    )


def _means(pattern: str, block: str) -> bool:
    return block in (pattern, f"{pattern}+w64") or pattern == "*+w64" or (pattern == "parent" and block == "kv8+w64")


def _is_equal(blocks: tuple[str, ...], equal: str | int | list[str] | None) -> bool:
    size = 1 if equal is None else 2 if equal == 2 else len(blocks)
    return all(len(set(blocks[start : start + size])) == 1 for start in range(0, len(blocks), size))


def four_layers() -> tuple[ScoreTable, CostTable]:
    """Each has four blocks, of 8, 6, 5 and 3 parameters; the smaller the worse, the more so the later."""
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)]
    for layer in range(4):
        rows += [cost_row(layer, "attention", name, 1, params=k) for name, k in (("kv8", 4), ("none", 1))]
        rows += [cost_row(layer, "ffn", name, 1, params=k) for name, k in (("w64", 4), ("none", 2))]
    blocks = [("kv8+w64", 0), ("kv8+none", 2), ("none+w64", 3), ("none+none", 6)]
    return score_table([[(name, kl * (1 + layer) / 8) for name, kl in blocks] for layer in range(4)]), cost_table(
        rows, (1,)
    )


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({}, "none+none none+w64 none+w64 kv8+w64"),
        ({"fix": {"first:1": "parent"}}, "kv8+w64 none+none none+w64 none+w64"),
        ({"fix": {0: ["kv8", "none+w64"]}}, "none+w64 none+none none+w64 kv8+w64"),
        ({"forbid": {"all": "none+none"}}, "none+w64 none+w64 none+w64 kv8+none"),
        ({"forbid": {"0": "none"}}, "kv8+w64 none+none none+w64 none+w64"),
        ({"equal": "all"}, "none+w64 none+w64 none+w64 none+w64"),
        ({"equal": 2}, "none+w64 none+w64 none+w64 none+w64"),
        ({"equal": ["1-3"]}, "none+none kv8+none kv8+none kv8+none"),
    ],
)
def test_what_is_chosen(settings: dict[str, object], blocks: str) -> None:
    rules = Recipe.model_validate({"parent": "p", "data": {"source": "s"}, "search": settings}).search
    assert " ".join(solve(ask(*four_layers(), TargetSettings(parameters="21"), rules)).blocks) == blocks


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"fix": {"9": "kv8"}}, "search.fix: 9 are no layers of this model, which has layers 0 to 3"),
        ({"forbid": {"last:5": "kv8"}}, "search.forbid: last:5 are no layers of this model, which has layers 0 to 3"),
        ({"fix": {"2-1": "kv8"}}, "search.fix: 2-1 are no layers of this model, which has layers 0 to 3"),
        (
            {"fix": {"all": "kv4"}},
            "search.fix: kv4 is no block or subblock of layer 0; it has kv8+w64, kv8+none, none+w64, none+none",
        ),
        ({"fix": {"0": "none"}}, "search.fix: none is both an attention and an FFN; write none+* or *+none"),
        (
            {"fix": {"0": "kv8"}, "forbid": {"all": "kv8+*"}},
            "search.fix, search.forbid: layer 0 has no block left; loosen one of them",
        ),
        (
            {"fix": {"0": "none+none", "1": "kv8"}, "equal": "all"},
            "search.equal: layers 0, 1, 2, 3 have no block in common that is allowed; take them apart, or loosen "
            "search.fix and search.forbid",
        ),
        ({"equal": ["0-2", "2-3"]}, "search.equal: layer 2 is in two groups; join them into one"),
        (
            {"fix": {"all": "kv8+*"}},
            "target.parameters: 21 asked; reachable 32 (parent) to 24 (0.75x); nearest: 24",
        ),
    ],
)
def test_what_a_person_can_get_wrong(settings: dict[str, object], line: str) -> None:
    with pytest.raises(PuzzleError) as raised:
        solve(ask(*four_layers(), TargetSettings(parameters="21"), SearchSettings(**settings)))
    assert str(raised.value) == line
