"""Tables of any library in one file: what is written is read back, what does not hold is refused by row and column."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tests.search.conftest import ask, everything, tables

from puzzle.artefacts import CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.query import Question, answer
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search import read_table, solve, to_table_file
from puzzle.search.tables import parent_totals

DOCS = Path(__file__).parents[2] / "docs" / "table-format.md"
EXAMPLES = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
EXACT = SearchSettings(gap=0, margin=0)


def read(folder: Path, table: dict[str, Any]) -> tuple[ScoreTable, CostTable]:
    path = folder / "table.json"
    path.write_text(json.dumps(table))
    tables = read_table(path)
    return tables.scores, tables.costs


@given(tables())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, pair: Any) -> None:
    scores, costs = pair
    path = tmp_path_factory.mktemp("table") / "table.json"
    path.write_text(to_table_file(scores, costs))
    read_scores, read_costs = read_table(path).scores, read_table(path).costs
    assert everything(read_scores, read_costs) == everything(scores, costs)
    assert parent_totals(read_scores, read_costs) == parent_totals(scores, costs)
    assert read_costs.scenario == costs.scenario


def test_the_documented_example_is_searched(tmp_path: Path) -> None:
    scores, costs = read(tmp_path, json.loads(EXAMPLES[0]))
    target = TargetSettings.model_validate({"throughput": "1.5x", "memory": "60%"})
    solution = solve(ask(scores, costs, target, EXACT))
    assert solution.blocks == ("kv8+w4096", "kv2+w1024", "small")
    assert solution.score == pytest.approx(0.05)
    assert solution.batch_size == 8
    # Added up by hand: 1 + 0.4 + 1.2 + 0.25 + 0.3 + 0.5 million; 2 + 3 + 4.5 + 4 + 2 + ... ms.
    assert solution.predicted["params"] == 3_650_000
    assert solution.predicted["prefill_ms"] == pytest.approx(2 + 3 + 6 + 2.5 + 2 + 4)
    assert solution.predicted["memory_bytes"] == 7_300_000 + 8 * (2_600_000 + 650_000 + 650_000)


def test_a_score_and_one_cost_are_enough(tmp_path: Path) -> None:
    scores, costs = read(tmp_path, json.loads(EXAMPLES[1]))
    solution = solve(ask(scores, costs, TargetSettings.model_validate({"parameters": "75%"}), EXACT))
    assert solution.blocks == ("full", "half")
    assert solution.score == pytest.approx(0.02)  # against the parent's 1.70
    assert solution.predicted["throughput_tok_s"] == 0


@pytest.mark.parametrize(
    ("place", "changed", "expected"),
    [
        (7, {"params": -1}, "rows[7].params: Input should be greater than or equal to 0, found -1"),
        (7, {"params": None}, "rows[8]: params is given in some rows of attention only; give it in all or none"),
        (7, {"parms": 1}, "rows[7].parms is not a setting; did you mean params?"),
        (7, {"layer": None}, "rows[7].layer: Input should be a valid integer, found None"),
        (7, {"batch_size": 4}, "rows[7].batch_size: found 4; scenario.batch_sizes has 1, 8"),
        (7, {"ffn": "w1"}, "rows[7].attention, ffn, block: found attention and ffn; give one"),
        (7, {"attention": None}, "rows[7].attention, ffn, block: found none of them; give one"),
        (7, {"score": 0.5}, "rows[7].attention: found a score or '+'; that is for rows of a block"),
        (7, {"attention": "kv8+w1"}, "rows[7].attention: found a score or '+'; that is for rows of a block"),
        (7, {"layer": 3}, "rows have a layer 3, parent has 3 blocks"),
        (8, {"attention": "kv8"}, "rows[8]: its costs at batch size 1 stand in an earlier row; keep one"),
        (8, {"attention": "kv3"}, "layer 0 has a block without costs at batch size 1; give a row of attention 'kv2'"),
        (18, {"batch_size": 1}, "layer 2 has a block without costs at batch size 8"),
        (1, {"score": None}, "rows[1].block: kv2+w4096 has neither a score nor costs"),
        (1, {"block": "kv8+w4096"}, "rows[1].score: an earlier row of kv8+w4096 has another"),
        (0, {"block": "kv2+w4096"}, "rows[1].score: an earlier row of kv2+w4096 has another"),
        (1, {"score": 1e300}, "rows[1].score: Input should be less than or equal to 1"),
        (7, {"params": 10**400}, "rows[7].params: Input should be less"),
        (7, {"layer": 10**18}, "rows[7].layer: Input should be less"),
        (1, {"score": float("nan")}, "rows[1].score: Input should be a finite number, found nan"),
        (4, {"block": "kv8+w1"}, "layer 1 has no score of the parent's block kv8+w4096"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, place: int, changed: dict[str, Any], expected: str) -> None:
    table = json.loads(EXAMPLES[0])
    table["rows"][place].update(changed)
    with pytest.raises(PuzzleError, match=re.escape(expected)) as caught:
        read(tmp_path, table)
    assert str(caught.value).startswith(str(tmp_path / "table.json"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"format": "puzzle-table-9"}, "format: Input should be 'puzzle-table-1', found 'puzzle-table-9'"),
        ({"rows": []}, "rows: "),
        ({"parent": []}, "parent: "),
        ({"fixed": [{"batch_size": 8, "params": 1}]}, "fixed has no row for batch size 1"),
        (
            {"fixed": [{"params": 1}, {"batch_size": 8, "params": 1}]},
            "fixed[1]: its costs at batch size 8 stand in an earlier row",
        ),
        ({"fixed": [{"batch_size": 2}]}, "fixed[0].batch_size: found 2"),
        ({"scenario": {"generated_tokens": 1, "batch_sizes": [1]}}, "table.json.scenario.prompt_tokens is missing"),
    ],
)
def test_a_wrong_head_is_named(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(PuzzleError, match=re.escape(expected)) as caught:
        read(tmp_path, json.loads(EXAMPLES[0]) | changed)
    assert "JSON" not in str(caught.value)


@pytest.mark.parametrize("without", [("kv_bytes_per_sequence",), ("decode_ms",), ("weight_bytes", "prefill_ms")])
def test_what_follows_from_an_unknown_cost_cannot_be_bounded(tmp_path: Path, without: tuple[str, ...]) -> None:
    table = json.loads(EXAMPLES[0])
    for row in (*table["fixed"], *table["rows"]):
        for column in without:
            row.pop(column, None)
    (tmp_path / "table.json").write_text(json.dumps(table))
    tables = read_table(tmp_path / "table.json")
    follows = {
        "kv_bytes_per_sequence": {"memory"},
        "decode_ms": {"throughput", "latency", "time_per_output_token"},
        "weight_bytes": {"memory", "disk"},
        "prefill_ms": {"throughput", "latency", "time_to_first_token"},
    }
    everything = (
        "throughput",
        "latency",
        "time_per_output_token",
        "time_to_first_token",
        "memory",
        "parameters",
        "disk",
    )
    known = ", ".join(name for name in everything if not any(name in follows[column] for column in without))
    with pytest.raises(
        PuzzleError, match=rf"it needs rows with .*{without[0]}.* above 0; the table has costs for {known}$"
    ):
        next(answer(tables, Question(target=[f"{min(follows[without[0]])}=2x"])))
    assert not any(column in to_table_file(tables.scores, tables.costs) for column in without)


def test_a_model_that_would_take_no_time(tmp_path: Path) -> None:
    table = json.loads(EXAMPLES[1])
    for row in table["rows"]:
        row["prefill_ms"] = 4.0 if row["block"] == "full" else 0.0
    with pytest.raises(
        PuzzleError, match=r"the fastest blocks of all layers take 0 ms at batch size 1; give in `fixed`"
    ):
        read(tmp_path, table)
    read(tmp_path, table | {"fixed": [{"prefill_ms": 1.0}]})


@pytest.mark.parametrize("text", ["", "{", "[1]", "NaN", "\ufffe", "[" * 100_000])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(PuzzleError, match=r"table\.json"):
        read_table(tmp_path / "table.json")
