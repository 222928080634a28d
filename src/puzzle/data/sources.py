"""The sources that the recipe names, as parts that are read document by document from any point on."""

import codecs
import hashlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from puzzle.data.documents import READERS, Document
from puzzle.data.hub import open_dataset
from puzzle.errors import PuzzleError
from puzzle.recipe import DataSettings
from puzzle.runs import digest, read_json, write_json

_CHUNK_BYTES = 2**20


class Part(Protocol):
    """A file or a dataset."""

    @property
    def identity(self) -> list[str | None]:
        """What makes it another text when it changes."""

    @property
    def size(self) -> float:
        """The sum of its documents' shares, for the progress bar."""

    def documents(self, start: int) -> Iterator[Document]:
        """Its documents in their order, from number `start` on."""


@dataclass(frozen=True)
class SourceFile:
    """A file; `name` is relative to the folder that the recipe names, so that the folder can move."""

    path: Path
    name: str
    column: str
    sha256: str

    @property
    def identity(self) -> list[str | None]:
        return [self.name, self.sha256]

    @property
    def size(self) -> float:
        return float(self.path.stat().st_size)

    def documents(self, start: int) -> Iterator[Document]:
        # What is skipped is read again but not tokenised, which is what takes the time.
        return islice(READERS[self.path.suffix.lower()](self.path, self.column), start, None)


@dataclass(frozen=True)
class Sources:
    """Everything that the recipe names, in its order; folders in the order of their file names."""

    parts: tuple[Part, ...]

    @property
    def address(self) -> str:
        return digest([part.identity for part in self.parts])


def open_sources(settings: DataSettings, memory: Path) -> Sources:
    """Find the sources, and hash what is new.

    Args:
        memory: file in which the files' hashes are remembered by size and time of change, and datasets' commits.
    """
    before: dict[str, str] = read_json(memory) if memory.exists() else {}
    known = dict(before)
    named = [settings.source] if isinstance(settings.source, str) else settings.source
    parts = tuple(part for source in named for part in _parts(source, settings, known))
    if known != before:
        write_json(memory, known)
    return Sources(parts)


def _parts(source: str, settings: DataSettings, known: MutableMapping[str, str]) -> Iterator[Part]:
    root = Path(source).expanduser()
    if root.is_dir():
        for path in _walk(root):
            yield SourceFile(path, path.relative_to(root).as_posix(), settings.column, _hash(path, known))
    elif root.exists():
        if root.suffix.lower() not in READERS:
            raise PuzzleError(f"data.source: {root} is of a kind that is not read; those read: {', '.join(READERS)}")
        yield SourceFile(root, root.name, settings.column, _hash(root, known))
    elif root.suffix.lower() in READERS:
        raise PuzzleError(f"data.source: {source} does not exist")
    else:
        # With a limit only the beginning is wanted, which a download of the whole would put off for hours.
        yield open_dataset(source, settings.column, streaming=settings.max_tokens is not None, known=known)


def _walk(root: Path) -> list[Path]:
    """The readable files below `root`, hidden ones left out, sorted by name."""
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(name.startswith(".") for name in path.relative_to(root).parts)
    ]
    readable = [path for path in files if path.suffix.lower() in READERS]
    if not readable:
        found = ", ".join(sorted({path.suffix or path.name for path in files})[:8]) or "no files"
        raise PuzzleError(f"data.source: nothing in {root} is readable ({found}); those read: {', '.join(READERS)}")
    return readable


def _hash(path: Path, known: MutableMapping[str, str]) -> str:
    try:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            known[key] = _hash_contents(path)
    except OSError as error:
        raise PuzzleError(f"data.source: {path} cannot be read: {error.strerror}") from None
    return known[key]


def _hash_contents(path: Path) -> str:
    """SHA-256; a PuzzleError, before anything is tokenised, if it is to be read as text and is not UTF-8."""
    sha256, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while chunk := file.read(_CHUNK_BYTES):
                sha256.update(chunk)
                if path.suffix.lower() != ".parquet":
                    decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise PuzzleError(f"data.source: {path} is not UTF-8 text; convert it or move it away") from None
    return sha256.hexdigest()
