"""Run folders: one process at a time, foreign and damaged ones refused, stages found by their addresses."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle import device
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline
from puzzle.recipe import Recipe, ScenarioSettings, ScoreSettings
from puzzle.runs import Run, StageFolder, create_folder, digest, open_run
from puzzle.runs.run import read_recipe
from puzzle.stages import Stage

_HOLD = """
import sys, time
from pathlib import Path
sys.argv[0] = "puzzle"  # as the command line does, which starts without torch
from puzzle.runs import open_run
with open_run(Path(sys.argv[1])):
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_is_there(folder: Path, recipe: Recipe) -> None:
    other = recipe.model_copy(update={"seed": 7})
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(PuzzleError, match=f"{folder} is in use by process {holder.pid}; wait"), open_run(folder):
            pass
        with pytest.raises(PuzzleError, match="is in use"):
            create_folder(folder, other)
        holder.kill()
    with open_run(folder) as run:  # the lock goes with its holder, however that ended
        assert run.recipe == recipe


def test_a_folder_takes_over_a_new_recipe_with_its_comments(folder: Path, recipe: Recipe) -> None:
    create_folder(folder, recipe, f"parent: {recipe.parent}  # mine\ndata: {{source: text}}\nseed: 3\n")
    assert "# mine" in (folder / "recipe.yaml").read_text()
    with open_run(folder) as run:
        assert run.recipe.seed == 3
    create_folder(folder, recipe.model_copy(update={"parent": f"./{recipe.parent}"}))


def test_a_folder_is_not_taken_over_by_another_parents_recipe(folder: Path, recipe: Recipe) -> None:
    before = (folder / "recipe.yaml").read_text()
    with pytest.raises(
        PuzzleError, match=rf"--out: {folder} is a run of the parent {recipe.parent}, not of other; name"
    ):
        create_folder(folder, recipe.model_copy(update={"parent": "other"}))
    assert (folder / "recipe.yaml").read_text() == before


def test_foreign_folders_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PuzzleError, match=r"--out: .* exists and is not a run folder"):
        create_folder(tmp_path, recipe)
    with pytest.raises(PuzzleError, match="exists and is not a run folder"):
        create_folder(tmp_path / "notes.txt", recipe)
    with pytest.raises(PuzzleError, match="is not a run folder of puzzle; make one"), open_run(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_whose_making_was_cut_off_is_made(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".puzzle.json.123.tmp").touch()
    create_folder(tmp_path, recipe)
    with open_run(tmp_path) as run:
        assert run.recipe == recipe


def test_auto_is_decided_once_and_kept_wherever_the_folder_goes(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = recipe.model_copy(update={"precision": "auto", "scenario": ScenarioSettings()})
    stage = Stage(name="stage", help="", reads=("precision", "scenario"))
    create_folder(tmp_path / "run", auto)
    for machine in ("bfloat16", "float32"):
        monkeypatch.setattr(device, "fast_dtype", lambda _, its=machine: its)
        create_folder(tmp_path / "run", auto)
        with open_run(tmp_path / "run") as run:
            assert (run.recipe.precision, run.recipe.scenario.dtype) == ("bfloat16", "bfloat16")
            assert ("auto is bfloat16 on " in capsys.readouterr().out) == (machine == "bfloat16")
            address = run.open(stage).address
        assert Recipe.read(tmp_path / "run" / "recipe.yaml") == auto
        assert read_recipe(tmp_path / "run") == run.recipe
    explicit = {"precision": "bfloat16", "scenario": ScenarioSettings(dtype="bfloat16")}
    create_folder(tmp_path / "run", recipe.model_copy(update=explicit))
    with open_run(tmp_path / "run") as run:
        assert run.open(stage).address == address


SCORE = Stage(name="score", help="", reads=("score.tokens", "data"), inputs=("library",))
PLAIN = Stage(name="plain", help="")


def test_a_stage_is_found_again_by_what_it_depends_on(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    stage = run.open(SCORE, library="a")
    (stage.path / "part").write_text("kept")
    same = Run(folder, recipe.model_copy(update={"seed": 7})).open(SCORE, library="a")
    assert same == stage
    assert (same.path / "part").read_text() == "kept"
    other = recipe.model_copy(update={"score": ScoreSettings(tokens=1)})
    others = [
        run.open(replace(SCORE, version=2), library="a"),
        Run(folder, other).open(SCORE, library="a"),
        run.open(SCORE, library="b"),
        run.open(replace(SCORE, name="other"), library="a"),
    ]
    assert len({stage.path for stage in [stage, *others]}) == 5
    described = json.loads((stage.path / "stage.json").read_text())
    assert digest(described) == stage.address
    assert described["settings"]["score.tokens"] == 65_536
    assert run.open(SCORE, library=stage) == run.open(SCORE, library=stage.address)


def test_facts_are_kept_and_finish_a_stage(folder: Path, recipe: Recipe) -> None:
    stage = Run(folder, recipe).open(PLAIN)
    assert not stage.done
    stage.commit(rows=3, name="x")
    again = Run(folder, recipe).open(PLAIN)
    assert again.done
    assert again.facts == {"rows": 3, "name": "x"}
    (again.path / "manifest.json").write_text("{")
    with pytest.raises(PuzzleError, match=r"manifest\.json is damaged; delete .*/plain-[0-9a-f]{12}, and"):
        _ = again.facts


@pytest.mark.parametrize("name", ["result.json", "training.bin", "checkpoint/model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["a byte", "half", "all"])
def test_what_is_damaged_is_noticed_and_the_advice_works(
    folder: Path, recipe: Recipe, name: str, damage: str, tmp_path: Path
) -> None:
    def open_stage(run: Run) -> StageFolder:
        stage = run.open(Stage(name="made", help=""))
        if not stage.done:
            (stage.path / "checkpoint").mkdir(exist_ok=True)
            for file in ("result.json", "training.bin", "checkpoint/model.safetensors"):
                (stage.path / file).write_text(f"[1, 2, 3] {file}")
            stage.commit(loss=1.5)
        return stage

    path = open_stage(Run(folder, recipe)).path
    file, whole = path / name, (path / name).read_bytes()
    changed = bytes([*whole[:-5], whole[-5] ^ 1, *whole[-4:]])
    file.write_bytes({"a byte": changed, "half": whole[: len(whole) // 2], "all": b""}[damage])
    with pytest.raises(PuzzleError) as caught:
        open_stage(Run(folder, recipe))
    assert str(caught.value) == f"{file} is damaged; delete {path}, and only that, and run the same command again"
    shutil.rmtree(path)
    assert open_stage(Run(folder, recipe)).facts == {"loss": 1.5}
    shutil.copytree(folder, tmp_path / "copy")
    assert open_stage(Run(tmp_path / "copy", recipe)).facts == {"loss": 1.5}


def test_a_folder_without_its_mark_is_made_again(folder: Path, recipe: Recipe) -> None:
    Run(folder, recipe).open(Stage(name="made", help="")).commit()
    (folder / "puzzle.json").unlink()
    create_folder(folder, recipe)
    assert Run(folder, recipe).open(Stage(name="made", help="")).done


def test_seconds_add_up_over_attempts_until_the_last_file_of_each(folder: Path, recipe: Recipe) -> None:
    stage = Run(folder, recipe).open(PLAIN)
    (stage.path / "deep").mkdir()
    (stage.path / "clock.json").write_text(json.dumps({"began": time.time() - 100, "spent_s": 5.0}))
    ages_s = {"a": 70, "deep/b": 40, "stage.json": 100, "clock.json": 100}
    for file, age_s in ages_s.items():
        (stage.path / file).touch()
        os.utime(stage.path / file, (time.time() - age_s,) * 2)
    Run(folder, recipe).open(PLAIN).commit()
    manifest = json.loads((stage.path / "manifest.json").read_text())
    assert manifest["seconds"] == pytest.approx(5 + 60, abs=2)
    assert manifest["finished"].startswith(time.strftime("%Y-"))


def test_seconds_of_a_run_are_those_of_its_finished_stages_by_name(folder: Path, recipe: Recipe) -> None:
    Run(folder, recipe).open(PLAIN).commit()
    run = Run(folder, recipe)
    for library in "ab":
        stage = run.open(SCORE, library=library)
        stage.commit()
        manifest = json.loads((stage.path / "manifest.json").read_text()) | {"seconds": 2.5}
        (stage.path / "manifest.json").write_text(json.dumps(manifest))
    run.open(replace(SCORE, name="evaluate"), library="")
    assert run.seconds() == {"score": 5.0}


def test_of_several_processes_only_the_first_makes_folders_and_only_for_their_stages(
    folder: Path, recipe: Recipe
) -> None:
    follower = Run(folder, recipe, leads=False, only=("score",))
    stage = follower.open(SCORE, library="")
    assert not stage.path.exists()
    assert Run(folder, recipe).open(SCORE, library="") == stage
    with pytest.raises(PuzzleError, match=r"is not finished, and several processes do score alone"):
        follower.open(PLAIN)


def test_an_address_is_the_same_everywhere(recipe: Recipe) -> None:
    value = {"b": [0.1 + 0.2, 1e-6, float("inf")], "a": {"y": None, "x": float("nan")}, "c": "ä"}
    turned = dict(reversed(value.items()))
    assert digest(value) == digest(turned)
    assert digest(value).startswith("b2e9a9f070c7")
    assert digest({"a": 1}) != digest({"a": 2})


def test_the_device_is_the_recipes(folder: Path, recipe: Recipe) -> None:
    def device(name: str) -> torch.device:
        execution = recipe.execution.model_copy(update={"device": name})
        return Run(folder, recipe.model_copy(update={"execution": execution})).device

    assert device("cpu") == torch.device("cpu")
    assert device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(PuzzleError, match=f"execution.device: found '{wrong}', which torch cannot use here"):
            device(wrong)


def test_threads_are_the_recipes(folder: Path, recipe: Recipe) -> None:
    before = torch.get_num_threads()
    Pipeline(Run(folder, recipe))
    assert torch.get_num_threads() == before
    execution = recipe.execution.model_copy(update={"threads": before + 1})
    Pipeline(Run(folder, recipe.model_copy(update={"execution": execution})))
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_log_lines_are_printed_and_kept(folder: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(folder, recipe)
    run.log("one")
    run.log_warning("two")
    assert capsys.readouterr().out == "one\nwarning: two\n"
    assert [line[20:] for line in (folder / "log.txt").read_text().splitlines()] == ["one", "warning: two"]


def test_warnings_are_those_of_the_stages_in_use(folder: Path, recipe: Recipe) -> None:
    """Not those of another target that the folder has had."""
    earlier, now, stage = Run(folder, recipe), Run(folder, recipe), Stage(name="search", help="")
    earlier.log_warning("before any stage")
    for run, warning in ((earlier, "2x is missed"), (now, "3x is missed"), (now, "3x is missed")):
        run.open(replace(stage, version=2 if run is now else 1)).commit()
        run.log_warning(warning)
    assert now.warnings == ["3x is missed"]
    again = Run(folder, recipe)
    again.open(stage)
    assert again.warnings == ["2x is missed"]
