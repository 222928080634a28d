"""Documents out of text files, jsonl, parquet and datasets of the hub; each source is read from any document on."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from puzzle.errors import PuzzleError, one_line
from puzzle.given import encoding_of, parse_json
from puzzle.recipe import EXAMPLE_SOURCE, DataSettings
from puzzle.runs import file_digest, is_run_folder, remembered

_TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".jl", ".js", ".jsx", ".kt"),
    *(".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx"),
)
_SUFFIXES = (*_TEXT, ".jsonl", ".ndjson", ".parquet")
"""Of the files that are read, in lower case."""
_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^:]*))?(?::(?P<split>.+))?")


class Document(NamedTuple):
    """A text, or a conversation that the chat template turns into text."""

    content: str | list[dict[str, Any]]
    """Messages as `[{"role": "user", "content": "..."}, ...]`."""
    place: str
    """For error messages: a file, `file:line` or `name row N`."""
    size: float


@dataclass(frozen=True)
class Source:
    """A file or a dataset."""

    identity: list[str | None]
    """What makes it another text when it changes; where a file lies does not."""
    size: Callable[[], float]
    """The sum of its documents' sizes: bytes of a file, rows of a dataset; 0 of a stream, which does not know them."""
    documents: Callable[[int], Iterator[Document]]
    """Its documents in their order, from a number on."""


def open_sources(settings: DataSettings, memory: Path) -> list[Source]:
    """Find the sources in the recipe's order, folders in the order of their file names.

    The file `memory` keeps the files' hashes, and the datasets' commits: a later push changes no run that has begun.
    """
    with remembered(memory) as known:
        return [source for name in settings.source for source in _open(name, settings, known)]


def _open(name: str, settings: DataSettings, known: dict[str, str]) -> Iterator[Source]:
    root = Path(name).expanduser()
    if root.exists() and not root.is_dir() and not root.is_file():
        raise PuzzleError(f"data.source: {root} is a pipe or a device, and text is read more than once; name a file")
    if root.exists():
        inside = [path.relative_to(root) for path in (sorted(root.rglob("*")) if root.is_dir() else [root])]
        runs = {path.parent for path in inside if is_run_folder(root / path.parent)}  # what a run writes is no text
        seen = (path for path in inside if not any(part.startswith(".") for part in path.parts))
        files = [root / path for path in seen if runs.isdisjoint(path.parents) and (root / path).is_file()]
        readable = [path for path in files if path.suffix.lower() in _SUFFIXES]
        if not readable:
            found = ", ".join(sorted({path.suffix or path.name for path in files})[:8]) or "no files"
            raise PuzzleError(f"data.source: {root} holds nothing to read ({found}); read are {', '.join(_SUFFIXES)}")
        sources, wrong = [], dict[Path, PuzzleError]()
        for path in readable:
            place = path.relative_to(root if root.is_dir() else root.parent).as_posix()
            try:
                found, size = file_digest(path, known), path.stat().st_size
            except OSError as error:
                raise PuzzleError(f"data.source: {path} cannot be read: {error.strerror}") from None
            sources.append(Source([place, found], partial(float, size), partial(_read_file, path, settings.column)))
            if (key := f"{path.suffix} {found} {settings.column}") not in known:
                try:
                    _check(path, settings.column)
                    known[key] = "can be read"
                except PuzzleError as error:
                    wrong[path] = error
        if len(wrong) > 1:
            names = ", ".join(map(str, [*wrong][:3])) + (", ..." if len(wrong) > 3 else "")
            first = next(iter(wrong.values()))
            raise PuzzleError(f"data.source: {len(wrong)} files cannot be read, {names}; the first: {first}")
        if wrong:
            raise wrong.popitem()[1]
        yield from sources
    elif root.suffix.lower() in _SUFFIXES or name.startswith(".") or not (match := _HUB.fullmatch(name)):
        cure = "is still the example's; name your files, folders or a dataset"
        raise PuzzleError(f"data.source: {name} {cure if name == EXAMPLE_SOURCE else 'does not exist'}")
    else:
        yield _dataset(match, settings, known)


def _check(path: Path, column: str) -> None:
    """Refuse a file that is no text, or whose first row is none."""
    try:
        if path.suffix.lower() != ".parquet" and any("\0" in str(piece.content) for piece in _read_text(path)):
            raise ValueError("it holds NULs")
    except ValueError as error:
        raise PuzzleError(f"data.source: {path} is not UTF-8 text ({error}); convert it or move it away") from None
    next(_read_file(path, column, 0), None)


def _read_file(path: Path, column: str, start: int) -> Iterator[Document]:
    """The documents of a file from number `start` on; what is skipped is read again, but not tokenised."""
    if (suffix := path.suffix.lower()) == ".parquet":
        from pyarrow.parquet import read_metadata

        rows = _load(str(path), "parquet", data_files=str(path), split="train", streaming=True)
        return _read_rows(rows, str(path), column, path.stat().st_size / max(1, read_metadata(path).num_rows), start)
    return islice(_read_text(path) if suffix in _TEXT else _read_jsonl(path, column), start, None)


def _read_text(path: Path) -> Iterator[Document]:
    """A file as one document; one above 256 KiB as even pieces of about that size, cut at line ends."""
    size = path.stat().st_size
    piece = max(1, ceil(size / max(1, ceil(size / 2**18))))
    decoder = codecs.getincrementaldecoder(_encoding(path))()  # a character that a cut splits goes to the next piece
    with path.open("rb") as file:
        while data := file.read(piece):
            if len(data) == piece:
                data += file.readline(piece)  # bounded, for a file that is one endless line
            yield Document(decoder.decode(data), str(path), len(data))
    decoder.decode(b"", final=True)


def _read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """A document a line that is not blank. Not by `datasets`: it names no wrong line and makes timestamps of dates."""
    with path.open(encoding=_encoding(path)) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if line.isspace():
                continue
            try:
                row = parse_json(line.rstrip())
            except ValueError as error:
                found = f"{place} is not valid JSON ({one_line(error)})"
                raise PuzzleError(f"data.source: {found}; correct or delete the line") from None
            yield Document(_content(row, column, place), place, len(line.encode()))


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return encoding_of(file.read(4))


def _dataset(match: re.Match[str], settings: DataSettings, known: dict[str, str]) -> Source:
    """One split of a dataset of the hub, at the commit at which it was first opened."""
    name, revision = match["name"], match["revision"] or "main"
    config, split, column = match["config"] or None, match["split"] or "train", settings.column
    key = f"dataset {name}@{revision}"
    if key not in known and not re.fullmatch("[0-9a-f]{40}", revision):
        from huggingface_hub import HfApi

        try:
            known[key] = str(HfApi().dataset_info(name, revision=revision).sha)
        except Exception as error:  # whatever the hub client raises, the reader needs one line
            found = f"{name} is no file or folder here, and the hub gives no such dataset ({one_line(error)})"
            offline = f"without network, name a commit of a downloaded one: {name}@<40 digits>"
            raise PuzzleError(f"data.source: {found}; {offline}") from None
    # With a limit only the beginning is wanted, which a download of the whole would put off for hours.
    commit = known.get(key, revision)
    options = {"split": split, "revision": commit, "streaming": settings.max_tokens is not None}
    load = cache(partial(_load, f"dataset {name}", name, config, **options))
    return Source(
        [name, config, split, commit],
        lambda: 0 if options["streaming"] else load().num_rows,
        lambda start: _read_rows(load(), name, column, 1, start),
    )


def _load(name: str, *arguments: str | None, **options: Any) -> Any:
    import datasets  # takes seconds

    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # whatever the library raises, the reader needs one line
        raise PuzzleError(f"data.source: {name} cannot be loaded: {one_line(error)}") from None


def _read_rows(dataset: Any, name: str, column: str, size: float, start: int) -> Iterator[Document]:
    place = f"{name} row {start}"
    try:
        for number, row in enumerate(dataset.skip(start), start):
            place = f"{name} row {number}"
            yield Document(_content(row, column, place), place, size)
    except PuzzleError:
        raise
    except Exception as error:  # a damaged file, a lost connection
        raise PuzzleError(f"data.source: reading stopped at {place}: {one_line(error)}") from None


def _content(row: object, column: str, place: str) -> str | list[dict[str, Any]]:
    """The text or conversation in a row's column; null is an empty text."""
    if not isinstance(row, dict):
        raise PuzzleError(f"data.source: {place} is a {type(row).__name__}, not an object with a column {column!r}")
    if column not in row:
        found = ", ".join(sorted(row)) or "none"
        raise PuzzleError(f"data.column: {place} has no column {column!r}; it has {found}: name one of those")
    content = "" if row[column] is None else row[column]
    written = content
    if isinstance(content, str) and content.lstrip().startswith("["):
        with suppress(ValueError):
            written = json.loads(content)  # tables without nested columns hold conversations so
    if isinstance(written, list) and all(isinstance(each, dict) and "role" in each for each in written):
        return [
            {name: _joined(each[name], place) if name == "content" else each[name] for name in each} for each in written
        ]
    if isinstance(content, str):
        return content
    found = f"{place} holds a {type(content).__name__} in {column!r} that is neither text nor a list of messages"
    raise PuzzleError(f"data.column: {found} with a role; name another column")


def _joined(content: object, place: str) -> object:
    """A message's content: of a list of parts their text."""
    if not isinstance(content, list):
        return content
    if others := [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]:
        found = others[0].get("type") if isinstance(others[0], dict) else others[0]
        raise PuzzleError(f"data.source: {place} has a message with a part {found!r}; only text is read: delete it")
    return "".join(str(part.get("text", "")) for part in content)
