"""Where a run stands, while another process may be at work."""

import os
from pathlib import Path

import pytest

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs import Run, Stage, open_run, status, write_text

STAGES = ("data", "score")


def begin(run: Run, name: str, version: int = 1) -> Stage:
    return run.stage(name, version=version, settings={}, inputs=[])


def test_a_fresh_folder(folder: Path) -> None:
    lines = status(folder, STAGES)
    assert lines[0].startswith(f"{folder}: ")
    assert lines[0].endswith("nobody at work")
    assert lines[1:3] == ["  data         -", "  score        -"]
    assert lines[3].startswith("next: data; `puzzle run ")


def test_what_is_done_where_it_stands_and_what_is_next(folder: Path) -> None:
    with open_run(folder) as run:
        begin(run, "data").commit()
        score = begin(run, "score")
        write_text(score.path / "rows", "x" * 2000)
        (score.path / ".table.1.tmp").touch()  # being written
        lines = status(folder, STAGES)
    assert "at work" in lines[0]
    assert "nobody" not in lines[0]
    assert lines[1].startswith("  data         done in 0 s, ")
    assert lines[2].startswith("  score        unfinished: 1 file, 2.")
    assert lines[2].endswith("the last written 0 s ago")
    assert lines[-1].startswith("next: score; ")


def test_everything_done_only_with_a_report_that_is_newer(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    for name in STAGES:
        begin(run, name).commit()
    assert status(folder, STAGES)[-1].startswith("next: report; ")
    write_text(folder / "report.html", "page")
    assert status(folder, STAGES)[-1] == f"everything is done; see {folder / 'report.html'}"
    os.utime(folder / "report.html", (1, 1))
    assert status(folder, STAGES)[-1].startswith("next: report; ")


def test_stages_of_earlier_settings_are_counted_apart(folder: Path, recipe: Recipe) -> None:
    earlier = Run(folder, recipe, 10**18)
    begin(earlier, "data").commit()
    begin(earlier, "score", version=1).commit()
    now = Run(folder, recipe, 2 * 10**18)
    begin(now, "data")
    begin(now, "score", version=2)
    begin(now, "score", version=3).commit()  # a stage may have several folders, one for each model
    lines = status(folder, STAGES)
    assert [line.split()[:2] for line in lines[1:4]].count(["score", "done"]) == 1
    assert sum(line.startswith("  score") for line in lines) == 2
    assert lines[4].startswith("kept from earlier commands: 1 stage folders, ")
    assert lines[-1].startswith("next: score; ")


def test_an_edited_recipe_is_noticed(folder: Path, recipe: Recipe) -> None:
    begin(Run(folder, recipe), "data").commit()
    assert not any("recipe.yaml is newer" in line for line in status(folder, STAGES))
    (folder / "recipe.yaml").write_text("parent: other")
    assert any("recipe.yaml is newer" in line for line in status(folder, STAGES))


def test_a_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(PuzzleError, match="is not a run folder"):
        status(tmp_path, STAGES)


def test_trained_variants_are_counted(folder: Path) -> None:
    assert not any(line.startswith("  variants") for line in status(folder, ["data"]))
    (folder / "variants").mkdir()
    (folder / "variants" / "some.safetensors").write_bytes(bytes(3000))
    assert "  variants     3.0 kB, trained once for all libraries" in status(folder, ["data"])
