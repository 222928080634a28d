"""The run folder: one recipe, one process at a time, and one folder per finished or unfinished stage.

DIR/puzzle.json              the mark of a run folder, with what `precision: auto` stands for in it
DIR/recipe.yaml              what the person wrote; edit it and only what depends on the edit runs again
DIR/used.json                the stage folders that the last command used, and the digest of its recipe
DIR/stages/NAME-ADDRESS/     a stage's files, and beside them
    stage.json               what the address is the hash of: name, version, settings read, addresses of inputs
    clock.json               when this attempt began, and the seconds of those before it
    manifest.json            written last: the stage is finished
DIR/architecture.json, summary.json, report.html, log.txt
"""

import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.runs.files import digest, file_digest, lost, read_json, read_with_digest, remembered, write_json, write_text
from puzzle.stages import Stage

if TYPE_CHECKING:
    import torch

_MARK, _LOCK = "puzzle.json", ".lock"


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage, found by its address; files in it are kept from one start to the next."""

    path: Path
    name: str
    address: str

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    @property
    def facts(self) -> dict[str, Any]:
        """What the finished stage wrote into its manifest."""
        return dict(read_json(self.path / "manifest.json")["facts"])

    def commit(self, **facts: Any) -> None:
        """Mark the stage as finished, with its seconds over all attempts; every file of it must be on disk."""
        clock = read_json(self.path / "clock.json")
        with remembered(self.path.parents[1] / "digests.json") as known:
            names = (file.relative_to(self.path).as_posix() for file, _ in files(self.path))
            # Not what only a start that goes on needs, nor what is written later.
            others = ("training0", "work/", "clock.json", "manifest.json", "warnings.txt")
            kept = sorted(name for name in names if not name.startswith(others))
            digests = {name: file_digest(self.path / name, known) for name in kept}
        manifest = {
            "stage": self.name,
            "address": self.address,
            "seconds": round(clock["spent_s"] + time.time() - clock["began"], 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "facts": json.loads(json.dumps(facts)),
            "files": digests,
        }
        write_json(self.path / "manifest.json", manifest | {"digest": digest(manifest)})

    def check(self) -> None:
        """Refuse a finished stage of which something is no longer what was written."""
        manifest = read_with_digest(self.path / "manifest.json")
        with remembered(self.path.parents[1] / "digests.json") as known:
            for name, written in manifest.get("files", {}).items():  # earlier versions named none
                if not (file := self.path / name).exists() or file_digest(file, known) != written:
                    raise lost(file, missing=not file.exists())


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    recipe: Recipe
    """Resolved: without `auto`."""
    on: str | None = field(default=None, compare=False)
    """The Ray cluster that tasks run on, `ray` or `ray://HOST:PORT`; None: here."""
    leads: bool = field(default=True, compare=False)
    """Whether this process writes and logs: of several that work together, the first."""
    only: tuple[str, ...] | None = field(default=None, compare=False)
    """The stages that may be worked on, all others being finished; None: all."""
    remeasure: bool = field(default=False, compare=False)
    """Whether what was measured is measured again."""
    used: list[StageFolder] = field(default_factory=list, compare=False)
    """What this command opened, in order; `used.json` names it for `puzzle status`."""

    def open(self, stage: Stage, **inputs: Any) -> StageFolder:
        """The stage's folder for the recipe's settings and these inputs: artefacts with an `address`, or plain data.

        It is made if it is not there, and its clock starts.
        """
        folder, identity = self.folder(stage, **inputs)
        if self.only is not None and stage.name not in self.only and not folder.done:
            found = f"{folder.path} is not finished, and several processes do {' and '.join(self.only)} alone"
            raise PuzzleError(f"{found}; run `puzzle refine {self.path}` first, without torchrun")
        if new := folder not in self.used:
            self.used.append(folder)
            if self.remeasure and stage.measures:
                (folder.path / "manifest.json").unlink(missing_ok=True)
        if not self.leads:
            return folder
        if new and folder.done:
            folder.check()
        folder.path.mkdir(parents=True, exist_ok=True)
        if not (folder.path / "stage.json").exists():
            write_json(folder.path / "stage.json", identity)
        if not folder.done:  # an attempt begins now; those before it count until the last file they wrote
            clock, spent_s = folder.path / "clock.json", 0.0
            if clock.exists():
                earlier = read_json(clock)
                spent_s = earlier["spent_s"] + max(0.0, last_written(folder.path) - earlier["began"])
            write_json(clock, {"began": time.time(), "spent_s": spent_s})
        if new:
            names = {each.name for each in self.used}
            # What comes later is still that of an earlier command with this recipe.
            kept = [path.name for name, path in used_folders(self.path, self.recipe) if name not in names]
            folders = [*(each.path.name for each in self.used), *kept]
            write_json(self.path / "used.json", {"recipe": _meaning(self.recipe), "folders": folders})
        return folder

    def folder(self, stage: Stage, **inputs: Any) -> tuple[StageFolder, dict[str, Any]]:
        """Where `open` finds the stage, there or not, and what its address is the hash of."""
        assert set(inputs) == set(stage.inputs), f"{stage.name}: declared inputs are {stage.inputs}, given {[*inputs]}"
        found = identity(stage, self.recipe)
        found["inputs"] = {name: getattr(value, "address", value) for name, value in inputs.items()}
        address = digest(found)
        return StageFolder(self.path / "stages" / f"{stage.name}-{address[:12]}", stage.name, address), found

    def seconds(self) -> dict[str, float]:
        """Time spent, over all attempts, on each stage that this command used and that is finished."""
        spent: dict[str, float] = defaultdict(float)
        for folder in self.used:
            if folder.done:
                spent[folder.name] += read_json(folder.path / "manifest.json")["seconds"]
        return dict(spent)

    @property
    def device(self) -> "torch.device":
        """`execution.device`; `auto` is the GPU if there is one."""
        from puzzle.device import choose_device

        return choose_device(self.recipe.execution.device)

    def log(self, line: str) -> None:
        """Print a line and keep it, with the time, in log.txt."""
        if self.leads:
            print(line, flush=True)
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def log_warning(self, line: str) -> None:
        """Log it, and keep it for the report beside the stage that was opened last."""
        self.log(f"warning: {line}")
        if self.leads and self.used:
            with (self.used[-1].path / "warnings.txt").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    @property
    def warnings(self) -> list[str]:
        """Those of the stages that this command used, each once."""
        files = filter(Path.exists, (folder.path / "warnings.txt" for folder in self.used))
        return [*dict.fromkeys(line for file in files for line in file.read_text("utf-8").splitlines())]


def identity(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """What a stage's address is the hash of, without its inputs."""
    values = recipe.model_dump(mode="json")
    settings = {path: reduce(getitem, path.split("."), values) for path in stage.reads}
    return {"stage": stage.name, "version": stage.version, "settings": settings}


def used_folders(path: Path, recipe: Recipe) -> list[tuple[str, Path]]:
    """The stages that the last command used, with their folders, in order; none if its recipe was another one."""
    found = read_json(path / "used.json") if (path / "used.json").exists() else {}
    same = isinstance(found, dict) and found.get("recipe") == _meaning(recipe)
    return [(name.rpartition("-")[0], path / "stages" / name) for name in (found["folders"] if same else ())]


def _meaning(recipe: Recipe) -> str:
    """Without settings that are not given, of which later versions may add some."""
    return digest(recipe.model_dump(mode="json", exclude={"execution"}, exclude_unset=True))


def is_run_folder(path: Path) -> bool:
    return (path / _MARK).exists()


def create_folder(path: Path, recipe: Recipe, text: str | None = None) -> None:
    """Make `path` a run folder of `recipe`, or of another that it was of; `text` is the recipe with its comments."""
    check_new(path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not is_run_folder(path):
            write_json(path / _MARK, {"format": 1})  # no other is read or written yet
        own = None
        with suppress(PuzzleError):  # none yet, or one that cannot be read
            own = Recipe.read(path / "recipe.yaml").parent
        if own is not None and Path(own).resolve() != Path(recipe.parent).resolve():
            found = f"{path} is a run of the parent {own}, not of {recipe.parent}"
            raise PuzzleError(f"--out: {found}; name another folder, or change `parent` in {path / 'recipe.yaml'}")
        write_text(path / "recipe.yaml", recipe.to_yaml() if text is None else text)


def check_new(path: Path) -> None:
    """Refuse what is no run folder and cannot become one; a start that was cut off at once leaves only hidden files."""
    if not path.exists() or is_run_folder(path) or (path / "stages").is_dir():
        return
    if not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise PuzzleError(f"--out: {path} exists and is not a run folder of puzzle; name a new or empty folder")


@contextmanager
def open_run(path: Path, on: str | None = None, *, remeasure: bool = False) -> Iterator[Run]:
    """The run in `path`, locked against other processes until the end of the block; see `Run.on`, `Run.remeasure`."""
    check_folder(path)
    with _locked(path):
        for leftover in path.rglob(".*.[0-9]*.tmp"):  # of `write_atomically` in killed processes
            leftover.unlink(missing_ok=True)
        run = Run(path, read_recipe(path), on=on, remeasure=remeasure)
        mark = read_json(path / _MARK)
        if run.recipe.precision == "auto":
            from puzzle.device import device_name, fast_dtype

            mark["precision"] = fast_dtype(run.device)
            run.log(f"precision: auto is {mark['precision']} on {device_name(run.device)}, in this folder from now on")
            write_json(path / _MARK, mark)
        yield replace(run, recipe=read_recipe(path))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run folder, resolved once the folder was opened."""
    return Recipe.read(path / "recipe.yaml").resolved(read_json(path / _MARK).get("precision", "auto"))


def check_folder(path: Path) -> None:
    """Refuse what is not a run folder."""
    if not is_run_folder(path):
        raise PuzzleError(f"{path} is not a run folder of puzzle; make one with `puzzle run RECIPE --out {path}`")


def process_in(path: Path) -> int | None:
    """The process that has the run folder open, as far as that can be seen without asking for the lock."""
    try:
        process = int((path / _LOCK).read_text())
        os.kill(process, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    except PermissionError:
        pass  # another user's, so it lives
    return process


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            found = f"{path} is in use by process {lock.read().strip() or 'unknown'}"
            raise PuzzleError(f"{found}; wait for it, or name another folder") from None
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield
        finally:
            lock.truncate(0)


def last_written(path: Path) -> float:
    """When the newest file below `path` was written."""
    return max((facts.st_mtime for _, facts in files(path)), default=0.0)


def files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below `path` but hidden ones, which are being written; others may come and go meanwhile."""
    for file in path.rglob("[!.]*"):
        with suppress(FileNotFoundError):
            if file.is_file():
                yield file, file.stat()
