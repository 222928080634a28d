"""The stage in a run folder."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.search.test_solve import two_batches

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs import Run, create_folder, open_run
from puzzle.search import Tables, search


def recipe(**target: str) -> Recipe:
    return Recipe.model_validate({"parent": "p", "data": {"source": "s"}, "target": target})


def asked(run: Run) -> Tables:
    scores, costs = two_batches()
    further = [(costs, each.target) for each in run.recipe.scenarios]
    return Tables(scores=scores, costs=costs, target=run.recipe.target, settings=run.recipe.search, further=further)


def test_a_search_is_written_once_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, _ = two_batches()
    create_folder(tmp_path / "run", recipe(parameters="70"))
    with open_run(tmp_path / "run") as run:
        tables = asked(run)
        first = search(run, tables)
        assert "search: sum of kl 0.5, proven optimal (HiGHS " in capsys.readouterr().out
        assert search(run, tables) == first
        assert "search: sum of kl" not in capsys.readouterr().out
        search(run, replace(tables, scores=replace(scores, sequences=2)))
        assert "search: sum of kl" in capsys.readouterr().out
        for kept in run.path.glob("stages/search-*/solution.json"):
            kept.write_text("{")
        with pytest.raises(PuzzleError, match=r"solution\.json is damaged; delete .*/stages/search-\w+, and only that"):
            search(run, tables)
    create_folder(tmp_path / "run", recipe(parameters="80%"))
    with open_run(tmp_path / "run") as run:
        assert search(run, asked(run)).bounds["params"] == 88


def test_further_scenarios_are_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    further = {"scenario": {"prompt_tokens": 64}, "target": {"memory": "60%"}}
    values = recipe(throughput="0.1x").model_dump(mode="json", exclude_unset=True)
    create_folder(tmp_path / "run", Recipe.model_validate(values | {"scenarios": [further]}))
    with open_run(tmp_path / "run") as run:
        solution = search(run, asked(run))
        said = " ".join(capsys.readouterr().out.split())
        assert search(run, asked(run)) == solution
    assert solution.blocks == ("kv4+w64",)
    assert "search: in torch, cpu, float32, prompt 8, generate 5, at batch size" in said
