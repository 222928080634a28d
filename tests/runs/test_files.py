"""Files are the old ones or the whole new ones, whatever happens."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from puzzle.errors import PuzzleError
from puzzle.runs import open_run, read_json, read_tensors, write_atomically, write_json, write_tensors, write_text

_WRITE_ON_AND_ON = """
import itertools, sys
from pathlib import Path
sys.argv[0] = "puzzle"  # as the command line does, which starts without torch
from puzzle.runs import write_text
for number in itertools.count():
    write_text(Path(sys.argv[1]), str(number % 10) * 4_000_000)
"""

_DIE_HALF_WAY = """
import os, signal, sys
from pathlib import Path
sys.argv[0] = "puzzle"  # as the command line does, which starts without torch
from puzzle.runs import write_atomically
def write(path):
    path.write_text("subblock")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for round_number in range(4):
        file.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", _WRITE_ON_AND_ON, str(file)]) as writer:
            while not file.exists():
                time.sleep(0.002)
            time.sleep(0.013 * round_number)
            writer.kill()
        text = file.read_text()
        assert len(text) == 4_000_000
        assert text == text[0] * len(text)


def test_what_a_kill_leaves_half_written_is_removed_when_the_run_goes_on(folder: Path) -> None:
    stage = folder / "stages" / "score-abc"
    stage.mkdir(parents=True)
    write_text(stage / "table", "old")
    died = subprocess.run([sys.executable, "-c", _DIE_HALF_WAY, str(stage / "table")])
    assert died.returncode == -signal.SIGKILL
    assert (stage / "table").read_text() == "old"
    assert len(list(stage.iterdir())) == 2
    with open_run(folder):
        assert [file.name for file in stage.iterdir()] == ["table"]


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")

    def write(path: Path) -> None:
        path.write_text("subblock")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(file, write)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}
    write_tensors(tmp_path / "file", tensors)
    back = read_tensors(tmp_path / "file")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_lost_and_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    part = tmp_path / "stages" / "score-123" / "deep" / "file"
    for read in (read_json, read_tensors):
        with pytest.raises(PuzzleError, match=f"{file} is missing; put it back, and run the same command again"):
            read(file)
        with pytest.raises(
            PuzzleError, match=f"{part} is missing; delete {part.parent.parent}, and only that, and run"
        ):
            read(part)
    write_tensors(file, {"a": torch.zeros(100)})
    file.write_bytes(file.read_bytes()[:-50])
    for read in (read_json, read_tensors):
        with pytest.raises(PuzzleError, match=f"{file} is damaged; delete {file}, and only that"):
            read(file)


def test_json_is_kept_exactly(tmp_path: Path) -> None:
    value = {"pi": 0.1 + 0.2, "text": "ä", "list": [1, None, True]}
    write_json(tmp_path / "file", value)
    assert read_json(tmp_path / "file") == value
