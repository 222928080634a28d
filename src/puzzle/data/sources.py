"""The files and datasets that the recipe names, each read document by document from any point on."""

import hashlib
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from puzzle.data.documents import SUFFIXES, Document, load_dataset, read_dataset, read_file
from puzzle.errors import PuzzleError, one_line
from puzzle.recipe import DataSettings
from puzzle.runs import read_json, write_json

_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]*))?(?::(?P<split>.+))?")


@dataclass(frozen=True)
class Source:
    """A file or a dataset."""

    identity: list[str | None]
    """What makes it another text when it changes; where a file lies does not."""
    documents: Callable[[int], Iterator[Document]]
    """Its documents in their order, from a number on."""
    size: Callable[[], float]
    """The sum of its documents' sizes: bytes of a file, rows of a dataset; 0 of a stream, which does not know them."""


def open_sources(settings: DataSettings, memory: Path) -> list[Source]:
    """Find the sources in the recipe's order, folders in the order of their file names; hash what is new.

    Args:
        memory: file that keeps the files' hashes by size and time of change, and the commits of datasets, so that a
            later push to a dataset does not change a run that has begun.
    """
    before: dict[str, str] = read_json(memory) if memory.exists() else {}
    known = dict(before)
    sources = [source for name in settings.source for source in _open(name, settings, known)]
    if known != before:
        write_json(memory, known)
    return sources


def _open(name: str, settings: DataSettings, known: MutableMapping[str, str]) -> Iterator[Source]:
    root = Path(name).expanduser()
    if root.is_dir():
        for path in _walk(root):
            yield _file(path, path.relative_to(root).as_posix(), settings.column, known)
    elif root.exists():
        if root.suffix.lower() not in SUFFIXES:
            raise PuzzleError(f"data.source: {root} is of a kind that is not read; those read: {', '.join(SUFFIXES)}")
        yield _file(root, root.name, settings.column, known)
    elif root.suffix.lower() in SUFFIXES or name.startswith(".") or not (match := _HUB.fullmatch(name)):
        raise PuzzleError(f"data.source: {name} does not exist")
    else:
        yield _dataset(match, settings, known)


def _file(path: Path, name: str, column: str, known: MutableMapping[str, str]) -> Source:
    try:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PuzzleError(f"data.source: {path} cannot be read: {error.strerror}") from None
    return Source([name, known[key]], partial(read_file, path, column), lambda: stat.st_size)


def _dataset(match: re.Match[str], settings: DataSettings, known: MutableMapping[str, str]) -> Source:
    """One split of a dataset of the hub, at the commit at which it was first opened."""
    name, revision = match["name"], match["revision"] or "main"
    config, split, column = match["config"] or None, match["split"] or "train", settings.column
    key = f"dataset {name}@{revision}"
    if key not in known:
        known[key] = revision if re.fullmatch("[0-9a-f]{40}", revision) else _resolve(name, revision)
    # With a limit only the beginning is wanted, which a download of the whole would put off for hours.
    options = {"split": split, "revision": known[key], "streaming": settings.max_tokens is not None}
    load = cache(partial(load_dataset, f"dataset {name}", column, name, config, **options))
    return Source(
        [name, config, split, known[key]],
        lambda start: read_dataset(load(), name, column, start, 1),
        lambda: 0 if options["streaming"] else load().num_rows,
    )


def _walk(root: Path) -> list[Path]:
    """The readable files below `root`, hidden ones left out, sorted by name."""
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(name.startswith(".") for name in path.relative_to(root).parts)
    ]
    readable = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not readable:
        found = ", ".join(sorted({path.suffix or path.name for path in files})[:8]) or "no files"
        raise PuzzleError(f"data.source: nothing in {root} is readable ({found}); those read: {', '.join(SUFFIXES)}")
    return readable


def _resolve(name: str, revision: str) -> str:
    """The commit that a branch or tag of a dataset points at."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # whatever the hub client raises, the reader needs one line
        raise PuzzleError(
            f"data.source: {name} is no file or folder here, and the hub gives no such dataset ({one_line(error)}); "
            f"without network, name a commit of a downloaded one: {name}@<40 digits>"
        ) from None
