"""The run folder: one recipe, one process at a time, and one folder per finished or unfinished stage.

    DIR/puzzle.json              the mark of a run folder
    DIR/recipe.yaml              what the person wrote; edit it and only what depends on the edit runs again
    DIR/stages/NAME-ADDRESS/     a stage's files; `manifest.json`, written last, says it is finished
    DIR/architecture.json, summary.json, report.html, log.txt

An address is the hash of the stage's name, its code version, the settings that change its meaning, and the addresses of its
inputs.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs.files import write_json, write_text

_MARK = "puzzle.json"
_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One stage's folder, found by its address; files in it are kept from one start to the next."""

    name: str
    address: str
    path: Path

    @property
    def done(self) -> bool:
        return self._manifest.exists()

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage wrote into its manifest."""
        facts: dict[str, Any] = json.loads(self._manifest.read_text())["facts"]
        return facts

    def commit(self, **facts: Any) -> None:
        """Mark the stage as finished; every file of it must be on disk."""
        write_json(self._manifest, {"stage": self.name, "address": self.address, "facts": facts})

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    recipe: Recipe

    def stage(self, name: str, *, version: int, settings: BaseModel | dict[str, Any], inputs: Sequence[str]) -> Stage:
        """The stage's folder for these settings and inputs, made if it is not there.

        Args:
            version: of the stage's code; raise it when the same settings would now give other results.
            settings: those that change the result, never those that say where or how to execute.
            inputs: addresses of the artefacts it reads.
        """
        plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
        address = digest({"stage": name, "version": version, "settings": plain, "inputs": list(inputs)})
        path = self.path / "stages" / f"{name}-{address[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return Stage(name, address, path)

    def log(self, line: str) -> None:
        """Print a line and keep it, with the time, in log.txt."""
        print(line, flush=True)
        with (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def log_warning(self, line: str) -> None:
        self.log(f"warning: {line}")


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_run_folder(path: Path) -> bool:
    return (path / _MARK).exists()


def create_folder(path: Path, recipe: Recipe) -> None:
    """Make `path` a run folder of `recipe`; a folder that is one already takes over the recipe."""
    if path.exists() and not is_run_folder(path) and (not path.is_dir() or any(path.iterdir())):
        raise PuzzleError(f"--out: {path} exists and is not a run folder of puzzle; name a new or empty folder")
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / _MARK, {"format": _FORMAT})
    write_text(path / "recipe.yaml", recipe.to_yaml())


@contextmanager
def open_run(path: Path) -> Iterator[Run]:
    """The run in `path`, locked against other processes until the end of the block."""
    check_folder(path)
    with (path / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise PuzzleError(
                f"{path} is in use by process {lock.read().strip() or 'unknown'}; wait for it, or name another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield Run(path, Recipe.read(path / "recipe.yaml"))


def check_folder(path: Path) -> None:
    """Refuse what is not a run folder, or one of a format this version cannot read."""
    if not is_run_folder(path):
        raise PuzzleError(f"{path} is not a run folder of puzzle; make one with `puzzle run RECIPE --out {path}`")
    try:
        found = json.loads((path / _MARK).read_text())["format"]
    except (ValueError, KeyError, TypeError):
        raise PuzzleError(f"{path / _MARK} is damaged; delete that folder or name another one") from None
    if found != _FORMAT:
        raise PuzzleError(f"{path} has run-folder format {found}, this version reads {_FORMAT}; name a new folder")
