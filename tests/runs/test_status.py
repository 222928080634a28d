"""Where a run stands, while another process may be at work."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs import Run, open_run, status, write_text
from puzzle.stages import COMMANDS, REPORT, Stage

PLAIN = [replace(stage, reads=(), inputs=()) for stage in COMMANDS if stage is not REPORT]
DATA, CALIBRATE, *_ = PLAIN


def test_a_fresh_folder_shows_the_stages_of_its_recipe(folder: Path) -> None:
    first, *stages, last = status(folder)
    assert first.startswith(f"{folder}: ")
    assert first.endswith("nobody at work")
    assert stages[:2] == ["  data         -", "  calibrate    -"]
    assert "  refine       -" not in stages  # the recipe asks for none
    assert last.startswith("next: data; `puzzle run ")


def test_what_is_done_where_it_stands_and_what_is_next(folder: Path) -> None:
    with open_run(folder) as run:
        run.open(DATA).commit()
        calibrate = run.open(CALIBRATE)
        write_text(calibrate.path / "rows", "x" * 2000)
        (calibrate.path / ".table.1.tmp").touch()  # being written
        lines = status(folder)
    assert "nobody" not in lines[0]
    assert "at work" in lines[0]
    assert lines[1].startswith("  data         done in 0 s, ")
    assert lines[2].startswith("  calibrate    unfinished: 1 file, 2.")
    assert lines[2].endswith("the last written 0 s ago")
    assert lines[-1].startswith("next: calibrate; ")


def test_everything_is_done_only_with_a_report_that_is_newer(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    for stage in PLAIN:
        run.open(stage).commit()
    assert status(folder)[-1].startswith("next: report; ")
    write_text(folder / "report.html", "page")
    assert status(folder)[-1] == f"everything is done; see {folder / 'report.html'}"
    os.utime(folder / "report.html", (1, 1))
    assert status(folder)[-1].startswith("next: report; ")


def test_stages_of_earlier_settings_are_counted_apart(folder: Path, recipe: Recipe) -> None:
    earlier, now = Run(folder, recipe), Run(folder, recipe)
    earlier.open(DATA).commit()
    earlier.open(CALIBRATE).commit()
    now.open(DATA)
    now.open(replace(CALIBRATE, version=2))
    now.open(replace(CALIBRATE, version=3)).commit()  # a stage may have several folders, one for each model
    lines = status(folder)
    assert [line.split()[1] for line in lines if line.startswith("  calibrate")] == ["unfinished:", "done"]
    assert any(line.startswith("kept from earlier commands: 1 stage folders, ") for line in lines)
    assert lines[-1].startswith("next: calibrate; ")


def test_an_edited_recipe_is_noticed(folder: Path, recipe: Recipe) -> None:
    Run(folder, recipe).open(DATA).commit()
    assert not any("recipe.yaml is newer" in line for line in status(folder))
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text + "seed: 3\n")
    os.utime(folder / "recipe.yaml", (2**32, 2**32))
    assert any("recipe.yaml is newer" in line for line in status(folder))


def test_a_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(PuzzleError, match="is not a run folder"):
        status(tmp_path)


def test_stages_without_a_command_are_shown(folder: Path, recipe: Recipe) -> None:
    Run(folder, recipe).open(Stage(name="pretrain", help="")).commit()
    assert any(line.startswith("  pretrain     done in 0 s") for line in status(folder))
