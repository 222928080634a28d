"""Stages are declared once, and the declarations are true: no stage reads a setting that its address lacks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.conftest import write_task

from puzzle.pipeline import run_stage
from puzzle.recipe import Recipe
from puzzle.runs import Run, StageFolder, create_folder, open_run
from puzzle.runs.run import identity
from puzzle.stages import COMMANDS, STAGES, Stage


class Recorded:
    """A recipe, or a section of it, that notes the path of every setting which is read."""

    def __init__(self, values: BaseModel, path: str, reads: list[str]) -> None:
        self._values, self._path, self._reads = values, path, reads

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._values, name), f"{self._path}{name}"
        if isinstance(value, BaseModel):
            return Recorded(value, f"{path}.", self._reads)
        # A method such as `model_dump` reads all of the section.
        self._reads.append(self._path.rstrip(".") if callable(value) else path)
        return value

    def __iter__(self) -> Iterator[Any]:
        self._reads.append(self._path.rstrip("."))
        return iter(self._values)


class RecordingRun(Run):
    """Notes what is read from where a stage is opened to where it is committed."""

    unfinished: list[tuple[Stage, StageFolder]]
    undeclared: set[tuple[str, str]]

    def open(self, stage: Stage, **inputs: Any) -> StageFolder:
        folder = super().open(stage, **inputs)
        if not folder.done:
            self.unfinished.append((stage, folder))
            self.reads.clear()
        return folder

    def committed(self, folder: StageFolder) -> None:
        while self.unfinished:
            stage, last = self.unfinished.pop()
            declared = (*stage.reads, *stage.inputs, "execution", "scenarios" if "scenario" in stage.inputs else "")
            self.undeclared |= {
                (stage.name, path)
                for path in self.reads
                if path and not any(path == name or path.startswith(f"{name}.") for name in declared)
            }
            if last == folder:
                break
        self.reads.clear()


def test_no_stage_reads_a_setting_that_its_address_lacks(
    pico_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole method with every optional stage, once."""
    settings = pico_recipe.model_dump(mode="json", exclude_unset=True)
    settings |= {"refine": {"tokens": 512}, "correct": {"tokens": 512}, "target": {"parameters": "70%"}}
    settings["data"] |= {"source": [settings["data"]["source"][0], "parent"], "sampled_tokens": 100}
    settings["evaluate"]["tasks"] = [str(write_task(tmp_path, "numbers"))]
    recipe = Recipe.model_validate(settings)
    create_folder(tmp_path / "run", recipe)
    commit = StageFolder.commit
    with open_run(tmp_path / "run") as opened:
        reads: list[str] = []
        run = RecordingRun(opened.path, Recorded(recipe, "", reads))  # type: ignore[arg-type]
        vars(run).update(reads=reads, unfinished=[], undeclared=set())
        monkeypatch.setattr(
            StageFolder, "commit", lambda folder, **facts: (commit(folder, **facts), run.committed(folder))
        )
        run_stage(run, "report")
    assert run.undeclared == set()
    done = {folder.name for folder in run.used if folder.done}
    others = ("report", "round")  # which needs types, and with them llama.cpp
    assert {stage.name for stage in COMMANDS if stage.name not in others} <= done


def test_declarations_name_settings_that_there_are(pico_recipe: Recipe) -> None:
    for stage in STAGES:
        assert [*identity(stage, pico_recipe)["settings"]] == [*stage.reads]
        assert not any(path.startswith("execution") for path in stage.reads)
    assert len({stage.name for stage in STAGES}) == len(STAGES)
