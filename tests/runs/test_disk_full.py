"""A full disk: one line, exit status 2, and nothing that was already computed is lost."""

import errno
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from puzzle.cli import main
from puzzle.runs import Run, write_tensors, write_text
from puzzle.stages import Stage


def test_the_old_file_stays(small_disk: Path) -> None:
    file = small_disk / "file"
    write_text(file, "old")
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(file, "new" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_text() == "old"
    assert list(small_disk.iterdir()) == [file]


def test_the_command_goes_on_once_there_is_space(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_stage(run: Run, name: str) -> None:
        stage = run.open(Stage(name=name, help=""))
        for index in range(4):
            file = stage.path / f"{index}.safetensors"
            if not file.exists():
                write_tensors(file, {"weight": torch.full((1500,), float(index))})
        stage.commit()

    pipeline = ModuleType("puzzle.pipeline")
    vars(pipeline).update(plan=lambda recipe: [], run_stage=run_stage)
    monkeypatch.setitem(sys.modules, "puzzle.pipeline", pipeline)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"parent": "model", "data": {"source": "text"}}))
    out = small_disk / "run"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40_960))

    assert main(["run", str(recipe), "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("puzzle: disk full: ")
    assert line.count("\n") == 1
    kept = {file: file.stat().st_mtime_ns for file in out.glob("stages/*/*.safetensors")}
    assert len(kept) in range(1, 4)

    ballast.unlink()
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    assert len(list(out.glob("stages/*/*.safetensors"))) == 4
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
