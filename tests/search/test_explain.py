"""What a person reads when a target cannot be met, and that it is true."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.search.conftest import BOUNDS, SETTINGS, ask, cost_row, cost_table, everything, score_table, tables

from puzzle.artefacts import CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES
from puzzle.recipe import TargetSettings
from puzzle.search import solve
from puzzle.search.tables import parent_totals


@pytest.fixture
def trade() -> tuple[ScoreTable, CostTable]:
    """Two layers; `kv4` halves the memory and keeps the time, `kv2` halves the time and keeps the memory.

    The parent: 1000 parameters in 2 kB, and 5 tokens a second. The fixed part costs no memory, and 200 of 1000 ms.
    """
    rows = [cost_row(-1, "fixed", "", 1, decode=50.0)]
    for layer in range(2):
        rows += [
            cost_row(layer, "ffn", "w64", 1),
            cost_row(layer, "attention", "kv8", 1, params=500, decode=100.0),
            cost_row(layer, "attention", "kv4", 1, params=250, decode=100.0),
            cost_row(layer, "attention", "kv2", 1, params=500, decode=50.0),
        ]
    return score_table([[("kv8+w64", 0.0), ("kv4+w64", 0.5), ("kv2+w64", 0.5)]] * 2), cost_table(rows, (1,))


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (
            {"throughput": "5x"},
            "target.throughput: 5x (25 tok/s) asked; reachable 5 tok/s (parent) to 8.333 tok/s (1.666x); "
            "nearest: 1.666x",
        ),
        (
            {"throughput": "100 tok/s", "memory": "80%"},
            "target.throughput: 100 tok/s asked; reachable 5 tok/s (parent) to 8.333 tok/s (1.666x); "
            "nearest with the other bounds kept: 6.25 tok/s",
        ),
        (
            {"memory": "10%"},
            "target.memory: 10% (200B) asked; reachable 2kB (parent) to 1kB (0.5x); nearest: 50%",
        ),
        (
            {"throughput": "1.5x", "memory": "1.5kB"},
            "target.throughput: 1.5x (7.5 tok/s), target.memory: 1.5kB: each alone can be met, together they cannot; "
            "nearest with the other bounds kept: target.throughput: 1.25x",
        ),
        (
            {"latency": "100ms", "parameters": "0.3k"},
            "target.latency: 100ms asked; reachable 1000ms (parent) to 600ms (0.6x); "
            "target.parameters: 300 asked; reachable 1k (parent) to 500 (0.5x); set each within its range",
        ),
        (
            {"throughput": "1.5x", "latency": "500ms", "memory": "1.5kB"},
            "target.latency: 500ms asked; reachable 1000ms (parent) to 600ms (0.6x); "
            "nothing was found within the other bounds either",
        ),
        (
            {"throughput": "1.5x", "latency": "700ms", "memory": "1.5kB"},
            "target.throughput: 1.5x (7.5 tok/s), target.latency: 700ms, target.memory: 1.5kB: each alone can be met, "
            "together they cannot; nearest with the other bounds kept: target.memory: 2kB",
        ),
        (
            {"throughput": "1.5x", "latency": "700ms", "memory": "1.5kB", "parameters": "75%"},
            "target.throughput: 1.5x (7.5 tok/s), target.latency: 700ms, target.memory: 1.5kB, target.parameters: "
            "75% (750): each alone can be met, together they cannot; giving way in one "
            "alone is not enough; loosen several",
        ),
        (
            {},
            "target: nothing is set; set at least one of throughput, latency, time_per_output_token, "
            "time_to_first_token, memory, parameters, disk, score, for example `throughput: 2x`",
        ),
        ({"memory": "0.1B"}, "target.memory: 0.1B is 0.1; set more than that"),
    ],
)
def test_the_line(trade: tuple[ScoreTable, CostTable], target: dict[str, str], line: str) -> None:
    with pytest.raises(PuzzleError) as raised:
        solve(ask(*trade, TargetSettings(**target), SETTINGS))
    assert str(raised.value) == line


def test_a_byte_out_of_reach_is_out_of_reach() -> None:
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0), cost_row(0, "ffn", "w64", 1)]
    rows += [cost_row(0, "attention", f"kv{k}", 1, params=k * 10**9) for k in (4, 2)]
    tables = score_table([[("kv4+w64", 0.0), ("kv2+w64", 0.5)]]), cost_table(rows, (1,))
    with pytest.raises(
        PuzzleError, match=r"^target.parameters: .* asked; reachable 4B \(parent\) to 2B .*nearest: 2B$"
    ):
        solve(ask(*tables, TargetSettings(parameters="1999999999"), SETTINGS))


@settings(max_examples=60, deadline=None)
@given(tables(), st.lists(st.sampled_from(BOUNDS), min_size=1, max_size=3, unique=True), st.data())
def test_the_nearest_target_can_be_met(
    case: tuple[ScoreTable, CostTable], names: list[str], data: st.DataObject
) -> None:
    """Whatever the line says to set can be set, and the search then finds something."""
    scores, costs = case
    parent = parent_totals(scores, costs)
    assume(all(parent[name] > 0 for name in names))
    target = {}
    for name in names:
        _, near = data.draw(st.sampled_from(everything(scores, costs)))
        share = near.as_dict()[name] / parent[name] * (1.01 if QUANTITIES[name].at_least else 0.99)
        assume(share > 0.01 and (share * parent[name] >= 1 or not QUANTITIES[name].exact))
        target[QUANTITIES[name].setting] = f"{share:.6f}x"
    try:
        solve(ask(scores, costs, TargetSettings(**target), SETTINGS))
    except PuzzleError as error:
        line = str(error)
    else:
        return
    nearest = re.search(r"nearest[a-z ]*: (?:target\.(\w+): )?([\d.]+x)$", line)
    if nearest:
        setting = nearest[1] or re.match(r"target\.(\w+)", line)[1]
        solve(ask(scores, costs, TargetSettings(**target | {setting: nearest[2]}), SETTINGS))
    else:
        assert line.endswith(("set each within its range", "within the other bounds either", "loosen several"))
