"""Hashes of values and files, and what is remembered of files so that they are read only once."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle.runs.files import read_json, write_json


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same on every machine, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def remembered(path: Path | None) -> Iterator[dict[str, str]]:
    """What is found out only once, such as hashes: read from `path` if it is there, written back if it grew."""
    known: dict[str, str] = read_json(path) if path is not None and path.exists() else {}
    before = len(known)
    yield known
    if path is not None and len(known) > before:
        write_json(path, known)


def file_digest(path: Path, known: dict[str, str]) -> str:
    """SHA-256 of a file, in `known` by its place, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[key]
