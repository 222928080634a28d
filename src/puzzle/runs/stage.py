"""One stage's folder: its address, its files, whether it is finished, and the time that went into it.

stages/NAME-ADDRESS/stage.json      what the address is the hash of; as old as the last command that used the stage
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
class Stage:
    """A stage's folder, found by its address; files in it are kept from one start to the next."""

    name: str
    address: str
    path: Path
    _spent_s: float = field(default=0.0, compare=False)
    """By attempts before this one."""
    _opened_s: float = field(default_factory=time.monotonic, compare=False)

    @property
    def done(self) -> bool:
        return self._manifest.exists()

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage wrote into its manifest."""
        facts: dict[str, Any] = read_json(self._manifest)["facts"]
        return facts

    @property
    def seconds(self) -> float:
        """Time spent on the stage: in total if it is finished, so far if not.

        An attempt that was cut off counts until the last file it wrote; what came after was lost and done again.
        """
        if self.done:
            return float(read_json(self._manifest)["seconds"])
        return self._spent_s + time.monotonic() - self._opened_s

    @property
    def finished(self) -> str:
        """When a finished stage was finished, as `2025-11-21T03:24:00+0100`."""
        return str(read_json(self._manifest)["finished"])

    def commit(self, **facts: Any) -> None:
        """Mark the stage as finished; every file of it must be on disk."""
        manifest = {
            "stage": self.name,
            "address": self.address,
            "seconds": round(self._spent_s + time.monotonic() - self._opened_s, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "facts": facts,
        }
        write_json(self._manifest, manifest)

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"


def find_stage(parent: Path, name: str, identity: dict[str, Any]) -> Stage:
    """The stage that `identity` describes, whether its folder is there or not; nothing is written."""
    address = digest(identity)
    return Stage(name, address, parent / f"{name}-{address[:12]}")


def open_stage(parent: Path, name: str, identity: dict[str, Any], command_ns: int) -> Stage:
    """The folder below `parent` of the stage that `identity` describes, made if it is not there.

    Args:
        command_ns: when the command began that uses it; stages with the same time belong together.
    """
    path = find_stage(parent, name, identity).path
    path.mkdir(parents=True, exist_ok=True)
    description = path / "stage.json"
    if not description.exists():
        write_json(description, identity)
    os.utime(description, ns=(command_ns, command_ns))
    done = (path / "manifest.json").exists()
    return Stage(name, digest(identity), path, 0.0 if done else _start_clock(path))


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
    """Every file below `path` but hidden ones, which are half written; others may come and go meanwhile."""
    for file in path.rglob("[!.]*"):
        try:
            facts = file.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(facts.st_mode):
            yield file, facts
