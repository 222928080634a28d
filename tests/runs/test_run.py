"""Run folders: one process at a time, foreign and damaged ones refused, stages found by their addresses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from puzzle.errors import PuzzleError
from puzzle.recipe import ExecutionSettings, Recipe
from puzzle.runs import Run, create_folder, digest, open_run

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
    create_folder(folder, recipe, "parent: other  # mine\ndata: {source: text}\n")
    assert "# mine" in (folder / "recipe.yaml").read_text()
    with open_run(folder) as run:
        assert run.recipe.parent == "other"


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


@pytest.mark.parametrize("mark", ["", "{", "[]", "null", '{"fmt": 1}'])
def test_a_damaged_mark_is_named_with_its_cure(folder: Path, mark: str) -> None:
    (folder / "puzzle.json").write_text(mark)
    with pytest.raises(PuzzleError, match="is damaged; write") as caught, open_run(folder):
        pass
    (folder / "puzzle.json").write_text(str(caught.value).split("write ")[1].split(" into it")[0])
    with open_run(folder):
        pass


def test_a_newer_format_is_refused(folder: Path, recipe: Recipe) -> None:
    (folder / "puzzle.json").write_text('{"format": 99}')
    with pytest.raises(PuzzleError, match="has run-folder format 99, this version reads 1"), open_run(folder):
        pass
    with pytest.raises(PuzzleError, match="format 99"):
        create_folder(folder, recipe)


def test_a_stage_is_found_again_by_what_it_depends_on(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    stage = run.stage("score", version=1, settings=recipe.score, inputs=["a"])
    (stage.path / "part").write_text("kept")
    same = run.stage("score", version=1, settings=recipe.score.model_dump(mode="json"), inputs=("a",))
    assert same == stage
    assert (same.path / "part").read_text() == "kept"
    others = [
        run.stage("score", version=2, settings=recipe.score, inputs=["a"]),
        run.stage("score", version=1, settings={"tokens": 1}, inputs=["a"]),
        run.stage("score", version=1, settings=recipe.score, inputs=["b"]),
        run.stage("other", version=1, settings=recipe.score, inputs=["a"]),
    ]
    assert len({stage.path for stage in [stage, *others]}) == 5
    described = json.loads((stage.path / "stage.json").read_text())
    assert digest(described) == stage.address


def test_facts_are_kept_and_finish_a_stage(folder: Path, recipe: Recipe) -> None:
    stage = Run(folder, recipe).stage("score", version=1, settings={}, inputs=[])
    assert not stage.done
    stage.commit(rows=3, name="x")
    again = Run(folder, recipe).stage("score", version=1, settings={}, inputs=[])
    assert again.done
    assert again.facts == {"rows": 3, "name": "x"}
    (again.path / "manifest.json").write_text("{")
    with pytest.raises(PuzzleError, match=r"manifest\.json is damaged; delete .*/score-[0-9a-f]{12}, and"):
        _ = again.facts


def test_seconds_add_up_over_attempts_until_the_last_file_of_each(folder: Path, recipe: Recipe) -> None:
    run = Run(folder, recipe)
    stage = run.stage("library", version=1, settings={}, inputs=[])
    (stage.path / "deep").mkdir()
    for file, age_s in ((stage.path / "a", 70), (stage.path / "deep" / "b", 40), (stage.path / "stage.json", 100)):
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    clock = stage.path / "clock.json"
    clock.write_text(json.dumps({"began": time.time() - 100, "spent_s": 5.0}))
    os.utime(clock, (time.time() - 100,) * 2)
    again = Run(folder, recipe, time.time_ns() - 10**11).stage("library", version=1, settings={}, inputs=[])
    assert again.seconds == pytest.approx(5 + 60, abs=2)
    again.commit()
    finished = run.stage("library", version=1, settings={}, inputs=[])
    assert finished.seconds == pytest.approx(5 + 60, abs=2)
    assert finished.finished.startswith(time.strftime("%Y-"))


def test_seconds_of_a_run_are_those_of_its_finished_stages_by_name(folder: Path, recipe: Recipe) -> None:
    Run(folder, recipe).stage("score", version=1, settings={}, inputs=[]).commit()
    run = Run(folder, recipe)
    for version in (2, 3):
        stage = run.stage("distil", version=version, settings={}, inputs=[])
        stage.commit()
        manifest = json.loads((stage.path / "manifest.json").read_text()) | {"seconds": float(version)}
        (stage.path / "manifest.json").write_text(json.dumps(manifest))
    run.stage("evaluate", version=1, settings={}, inputs=[])
    assert run.seconds() == {"distil": 5.0}


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


def test_threads_are_the_recipes(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    Run(folder, recipe).apply_threads()
    execution = recipe.execution.model_copy(update={"threads": 3})
    Run(folder, recipe.model_copy(update={"execution": execution})).apply_threads()
    assert calls == [3]


def test_log_lines_are_printed_and_kept(folder: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(folder, recipe)
    run.log("one")
    run.log_warning("two")
    assert capsys.readouterr().out == "one\nwarning: two\n"
    assert [line[20:] for line in (folder / "log.txt").read_text().splitlines()] == ["one", "warning: two"]


def test_half_of_what_is_available_is_the_default(
    folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = recipe.model_copy(update={"execution": ExecutionSettings(device="cpu")})
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < Run(folder, here).memory_bytes <= installed // 2

    def read_text(path: Path) -> str:
        return "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n"

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        assert Run(folder, here).memory_bytes == 1024 * 2000
    with monkeypatch.context() as patch:  # as on systems without that file
        patch.setattr(Path, "read_text", lambda path: "")
        assert Run(folder, here).memory_bytes == installed // 2
    stated = recipe.model_copy(update={"execution": ExecutionSettings(memory="3kB")})
    assert Run(folder, stated).memory_bytes == 3000
