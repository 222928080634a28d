"""Atomic writing: a file is either the old one or the whole new one, also after kill -9 or a power cut; and hashes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from puzzle.errors import PuzzleError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")


def write_atomically(path: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk and rename it into place.

    Without `flush`, for what can be computed again, a kill leaves it whole and a power cut need not.
    """
    # Processes of other machines may be at the same file, with the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.uname().nodename}.tmp")
    try:
        write(temporary)
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if flush:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return read_parsed(path, json.loads)


def read_parsed(path: Path, parse: Callable[[str], _T]) -> _T:
    """What `parse` makes of a file of a run folder; a PuzzleError if it is missing or damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise lost(path, isinstance(error, FileNotFoundError)) from None


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], *, flush: bool = True) -> None:
    """A safetensors file; tensors are made contiguous and moved to the CPU. See `write_atomically` for `flush`."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary), flush=flush)


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """All tensors of a safetensors file; a PuzzleError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (FileNotFoundError, SafetensorError) as error:
        raise lost(path, isinstance(error, FileNotFoundError)) from None


def lost(path: Path, missing: bool = False) -> PuzzleError:
    """What is said of a file of a run folder that is missing or damaged."""
    found = "is missing" if missing else "is damaged"
    stage = next((parent for parent in path.parents if parent.parent.name == "stages"), None)
    cure = f"delete {stage or path}, and only that" if stage or found == "is damaged" else "put it back"
    return PuzzleError(f"{path} {found}; {cure}, and run the same command again")


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same on every machine, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_with_digest(path: Path) -> dict[str, Any]:
    """What was written with its own digest, unharmed; earlier versions wrote none."""
    values: dict[str, Any] = read_json(path)
    given = values.pop("digest", None) if isinstance(values, dict) else ""
    if given is not None and given != digest(values):
        raise lost(path)
    return values


@contextmanager
def remembered(path: Path | None) -> Iterator[dict[str, str]]:
    """What is found out only once, such as hashes: read from `path` if it is there, written back if it grew."""
    known = read_with_digest(path) if path is not None and path.exists() else {}
    before = len(known)
    yield known
    if path is not None and len(known) > before:
        write_json(path, known | {"digest": digest(known)})


def file_digest(path: Path, known: dict[str, str]) -> str:
    """SHA-256 of a file, in `known` by its place, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[key]
