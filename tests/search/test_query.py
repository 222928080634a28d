"""Questions to tables of several scenarios: every answer serves all of them."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.search.test_scenarios import _long_prompts
from tests.search.test_solve import two_batches

from puzzle.artefacts import Solution
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline
from puzzle.query import Question, answer
from puzzle.recipe import Recipe, SearchSettings, TargetSettings
from puzzle.runs import create_folder, open_run
from puzzle.search import BASELINES, Tables


@pytest.fixture
def tables() -> Tables:
    """Of two blocks, the target allows both, and the further scenario only the smaller one."""
    scores, costs = two_batches()
    target, settings = TargetSettings(throughput="0.1x"), SearchSettings(gap=0, margin=0)
    further = [(_long_prompts(), TargetSettings(memory="60%"))]
    return Tables(scores=scores, costs=costs, target=target, settings=settings, further=further)


def ask(tables: Tables, **question: Any) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as printed:
        for part in answer(tables, Question(**question)):
            console.print(part)
    return printed.get()


@pytest.mark.parametrize("question", [{}, {"pool": 2}, {"frontier": 3}, *({"baseline": name} for name in BASELINES)])
def test_every_answer_serves_all_scenarios(tables: Tables, question: dict[str, Any], tmp_path: Path) -> None:
    if question.get("baseline") == "depth":  # there is no empty block
        with pytest.raises(PuzzleError, match="it finds nothing within the target"):
            ask(tables, **question)
        return
    ask(tables, out=tmp_path / "found.json", **question)
    found = json.loads((tmp_path / "found.json").read_text())
    for each in found if isinstance(found, list) else [found]:
        solution = Solution.from_json(json.dumps(each))
        (serving,) = solution.further
        assert solution.blocks == ("kv4+w64",)
        assert serving.predicted["memory_bytes"] <= serving.bounds["memory_bytes"] < serving.parent["memory_bytes"]
    alone = replace(tables, further=[])
    ask(alone, out=tmp_path / "alone.json")
    assert Solution.from_json((tmp_path / "alone.json").read_text()).blocks == ("kv8+w64",)


def test_what_is_asked_there_is_printed(tables: Tables) -> None:
    printed = ask(tables)
    assert "asked in torch, cpu, float32, prompt 8, generate 5, at batch size 8: memory at most 38.4 kB" in printed
    assert "predicted: memory 32.0 kB" in printed


def test_a_bound_there_on_what_has_no_costs_is_named(tables: Tables) -> None:
    costs = _long_prompts()
    unknown = replace(costs, rows=tuple(replace(row, prefill_ms=0.0, decode_ms=0.0) for row in costs.rows))
    target = TargetSettings.model_validate({"latency": "10ms"})
    with pytest.raises(
        PuzzleError, match=r"^scenarios\[0\]\.target\.latency: it needs rows with prefill_ms and decode_ms above 0"
    ):
        ask(replace(tables, further=[(unknown, target)]))


def test_a_run_hands_on_its_further_scenarios(tmp_path: Path) -> None:
    asked = {"scenario": {"prompt_tokens": 64}, "target": {"memory": "60%"}}
    values = {"parent": "p", "data": {"source": "s"}, "target": {"throughput": "0.1x"}, "scenarios": [asked]}
    create_folder(tmp_path / "run", Recipe.model_validate(values))
    scores, costs = two_batches()
    with open_run(tmp_path / "run") as run:
        pipeline = Pipeline(run)
        vars(pipeline).update(scores=scores, all_costs=[costs, _long_prompts()])  # as if they were measured
        ask(pipeline.tables, out=tmp_path / "found.json")
    assert Solution.from_json((tmp_path / "found.json").read_text()).blocks == ("kv4+w64",)


def test_a_score_that_the_table_has_not_is_named(tables: Tables) -> None:
    with pytest.raises(PuzzleError, match=r"^search.score: every cosine in the table is 0; leave it at kl"):
        ask(tables, search=["score=cosine"])


@pytest.mark.parametrize(("given", "of"), [("over", "frontier"), ("figure", "frontier"), ("differing", "pool")])
def test_what_belongs_to_another_answer_is_named(tables: Tables, given: str, of: str) -> None:
    with pytest.raises(PuzzleError, match=f"^--{given}: it belongs to a {of}; give --{of} N too"):
        ask(tables, **{given: 1})
