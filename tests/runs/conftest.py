"""A run folder, and a disk that is soon full."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from puzzle.recipe import Recipe
from puzzle.runs import create_folder

GIVEN = {"parent": "model", "data": {"source": "text"}, "precision": "float32", "scenario": {"dtype": "float32"}}
RECIPE = Recipe.model_validate(GIVEN)


@pytest.fixture
def recipe() -> Recipe:
    return RECIPE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    create_folder(path, RECIPE)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)
