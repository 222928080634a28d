"""The folder of one stage: its address, its files, whether it is finished, and the time that went into it.

stages/NAME-ADDRESS/stage.json      what the address is the hash of
                    clock.json      when this attempt began, and the seconds of those before it
                    manifest.json   written last: the stage is finished
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle.runs.files import read_json, write_json


@dataclass(frozen=True)
class StageFolder:
    """Files in it are kept from one start to the next."""

    path: Path
    name: str
    address: str
    _spent_s: float = field(default=0.0, compare=False)
    """By attempts before this one."""
    _opened_s: float = field(default_factory=time.monotonic, compare=False)

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """Of a finished stage: `seconds` over all attempts, when it was `finished`, and its `facts`.

        An attempt that was killed counts until the last file it wrote; what came after was lost and done again.
        """
        manifest: dict[str, Any] = read_json(self.path / "manifest.json")
        return manifest

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage wrote into its manifest."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts

    def commit(self, **facts: Any) -> None:
        """Mark the stage as finished; every file of it must be on disk."""
        manifest = {
            "stage": self.name,
            "address": self.address,
            "seconds": round(self._spent_s + time.monotonic() - self._opened_s, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "facts": facts,
        }
        write_json(self.path / "manifest.json", manifest)


def find_folder(root: Path, identity: dict[str, Any]) -> StageFolder:
    """The folder below `root` of the stage that `identity` describes, whether it is there or not."""
    address, name = digest(identity), identity["stage"]
    return StageFolder(root / f"{name}-{address[:12]}", name, address)


def open_folder(root: Path, identity: dict[str, Any]) -> StageFolder:
    """The same, made if it is not there; its clock starts unless it is finished."""
    folder = find_folder(root, identity)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not (folder.path / "stage.json").exists():
        write_json(folder.path / "stage.json", identity)
    return folder if folder.done else StageFolder(folder.path, folder.name, folder.address, _start_clock(folder.path))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same on every machine, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _start_clock(path: Path) -> float:
    """Note that an attempt begins now; the seconds of the attempts before it."""
    clock, spent_s = path / "clock.json", 0.0
    if clock.exists():
        earlier = read_json(clock)
        spent_s = earlier["spent_s"] + max(0.0, last_written(path) - earlier["began"])
    write_json(clock, {"began": time.time(), "spent_s": spent_s})
    return spent_s


def last_written(path: Path) -> float:
    """When the newest file below `path` was written."""
    return max((facts.st_mtime for _, facts in files(path)), default=0.0)


def files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below `path` but hidden ones, which are being written; others may come and go meanwhile."""
    for file in path.rglob("[!.]*"):
        try:
            facts = file.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(facts.st_mode):
            yield file, facts
