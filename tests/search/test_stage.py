"""The stage in a run folder."""

from pathlib import Path

import pytest
from tests.search.test_solve import two_batches

from puzzle.recipe import Recipe
from puzzle.runs import create_folder, open_run
from puzzle.search import search


def recipe(**target: str) -> Recipe:
    return Recipe.model_validate({"parent": "p", "data": {"source": "s"}, "target": target})


def test_a_search_is_written_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, costs = two_batches()
    create_folder(tmp_path / "run", recipe(parameters="70"))
    with open_run(tmp_path / "run") as run:
        first = search(run, scores, costs, ["a", "b"])
        assert "search: summed KL 0.5 (optimal within 0.0e+00" in capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr("puzzle.search.stage.solve", None)
            assert search(run, scores, costs, ["a", "b"]) == first
        search(run, scores, costs, ["a", "c"])
        assert "search: summed KL" in capsys.readouterr().out
    create_folder(tmp_path / "run", recipe(parameters="80%"))
    with open_run(tmp_path / "run") as run:
        assert search(run, scores, costs, ["a", "b"]).bounds.params == 88
