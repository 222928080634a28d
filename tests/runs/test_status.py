"""Where a run stands, while another process may be at work."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs import Run, open_run, status, write_json, write_text
from puzzle.stages import CALIBRATE as CALIBRATE_STAGE
from puzzle.stages import COMMANDS, DISTIL, EVALUATE, LIBRARY, REPORT, UNIFORM
from puzzle.stages import DATA as DATA_STAGE

PLAIN = [replace(stage, reads=(), inputs=()) for stage in COMMANDS if stage is not REPORT]
DATA, CALIBRATE = (stage for stage in PLAIN if stage.name in ("data", "calibrate"))


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
    now.open(replace(CALIBRATE, version=CALIBRATE.version + 2)).commit()
    now.open(replace(CALIBRATE, version=CALIBRATE.version + 1))  # a stage may have several folders, one for each model
    lines = status(folder)
    assert [line.split()[1] for line in lines if line.startswith("  calibrate")] == ["unfinished:"]
    assert any(line.startswith("kept from earlier commands: 1 stage folders, ") for line in lines)
    assert lines[-1].startswith("next: calibrate; ")


def test_every_stage_is_one_line_and_the_uniform_childs_are_below_its_own(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    for stage, value in (
        (LIBRARY, 1),
        (DISTIL, 1),
        (UNIFORM, 1),
        (LIBRARY, 2),
        (DISTIL, 2),
        (EVALUATE, 1),
        (EVALUATE, 2),
    ):
        made = run.open(replace(stage, reads=(), inputs=("value",)), value=value)
        write_json(made.path / "clock.json", {"began": time.time() - 60 * value, "spent_s": 0.0})
        made.commit()
    lines = [re.sub(r", [0-9.]+ k?B, .*", "", line) for line in status(folder) if "done" in line]
    assert lines == [
        "  library      done in 1 min 0 s",
        "  distil       done in 1 min 0 s",
        "  evaluate     done in 3 min 0 s, 2 parts",
        "  uniform      done in 1 min 0 s",
        "    library      done in 2 min 0 s",
        "    distil       done in 2 min 0 s",
    ]


def test_only_folders_of_this_recipe_count_as_done(folder: Path, recipe: Recipe) -> None:
    """Another command of the same recipe keeps what came later; another recipe keeps what it may read back."""
    inputs = dict.fromkeys(("parent", "data", "tokenizer", "sources"))
    first = Run(folder, recipe)
    for stage in (DATA_STAGE, CALIBRATE_STAGE):
        first.open(stage, **{name: inputs[name] for name in stage.inputs}).commit()
    again = Run(folder, recipe)
    again.open(DATA_STAGE, tokenizer=None, sources=None)
    assert [line.split()[1] for line in status(folder)[1:3]] == ["done", "done"]

    other = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"tokens": 7})})
    write_text(folder / "recipe.yaml", other.to_yaml())
    data, calibrate = status(folder)[1:3]
    assert data == "  data         kept from an earlier command, if its inputs are the same"
    assert calibrate == "  calibrate    -"
    Run(folder, other).open(DATA_STAGE, tokenizer=None, sources=None)
    data, calibrate = status(folder)[1:3]
    assert data.startswith("  data         done in 0 s")
    assert calibrate == "  calibrate    -"


def test_a_pause_between_two_starts_counts_for_nothing(folder: Path, recipe: Recipe) -> None:
    stage = Run(folder, recipe).open(DATA)
    write_json(stage.path / "clock.json", {"began": 1000.0, "spent_s": 20.0})
    write_text(stage.path / "part", "")
    for file in stage.path.iterdir():
        os.utime(file, (1060.0, 1060.0))  # a minute later it was stopped
    Run(folder, recipe).open(DATA).commit()
    assert status(folder)[1].startswith("  data         done in 1 min 20 s, ")


def test_a_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(PuzzleError, match="is not a run folder"):
        status(tmp_path)
