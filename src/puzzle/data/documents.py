"""Documents out of text files, jsonl, parquet and datasets of the Hugging Face hub."""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from puzzle.errors import PuzzleError, one_line

Messages = list[dict[str, Any]]
"""A conversation, `[{"role": "user", "content": "..."}, ...]`."""

_TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".jl", ".js", ".jsx", ".kt"),
    *(".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx"),
)
SUFFIXES = (*_TEXT, ".jsonl", ".ndjson", ".parquet")
"""Of the files that are read, in lower case."""
_CUT_BYTES = 256 * 2**10


@dataclass(frozen=True)
class Document:
    """A text, or a conversation that the chat template turns into text."""

    content: str | Messages
    place: str
    """For error messages: a file, `file:line` or `name row N`."""
    size: float
    """In the unit of its source's size, for the progress bar."""


def read_file(path: Path, column: str, start: int) -> Iterator[Document]:
    """The documents of a file from number `start` on; their sizes add up to that of the file."""
    if (suffix := path.suffix.lower()) == ".parquet":
        from pyarrow.parquet import read_metadata

        rows = load_dataset(str(path), column, "parquet", data_files=str(path), split="train", streaming=True)
        size = path.stat().st_size / max(1, read_metadata(path).num_rows)
        return read_dataset(rows, str(path), column, start, size)
    documents = _read_text(path) if suffix in _TEXT else _read_jsonl(path, column)
    return islice(documents, start, None)  # what is skipped is read again, but not tokenised


def load_dataset(name: str, column: str, *arguments: str | None, **options: Any) -> Any:
    """`datasets.load_dataset` with these arguments; of the rows, `column` alone."""
    import datasets  # takes seconds

    try:
        dataset = datasets.load_dataset(*arguments, **options)
        names = dataset.column_names  # None: a stream that does not know them; its rows are checked one by one
    except Exception as error:  # whatever the library raises, the reader needs one line
        raise PuzzleError(f"data.source: {name} cannot be loaded: {one_line(error)}") from None
    if names is not None:
        _check_column(column, names, name)
    return dataset if names is None else dataset.select_columns([column])


def read_dataset(dataset: Any, name: str, column: str, start: int, size: float) -> Iterator[Document]:
    """The rows of a dataset from number `start` on, each of size `size`."""
    place = f"{name} row {start}"
    try:
        for number, row in enumerate(dataset.skip(start), start):
            place = f"{name} row {number}"
            yield Document(_content(row, column, place), place, size)
    except PuzzleError:
        raise
    except Exception as error:  # a damaged file, a lost connection
        raise PuzzleError(f"data.source: reading stopped at {place}: {one_line(error)}") from None


def _read_text(path: Path) -> Iterator[Document]:
    """A file as one document; one above 256 KiB as even pieces of about that size, cut at line ends."""
    size = path.stat().st_size
    piece = max(1, ceil(size / max(1, ceil(size / _CUT_BYTES))))
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a character that a cut splits goes to the next piece
    with path.open("rb") as file:
        try:
            while data := file.read(piece):
                if len(data) == piece:
                    data += file.readline(piece)  # bounded, for a file that is one endless line
                yield Document(decoder.decode(data), str(path), len(data))
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise PuzzleError(f"data.source: {path} is not UTF-8 text; convert it or move it away") from None


def _read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """A document a line that is not blank. Not by `datasets`: it names no wrong line and makes timestamps of dates."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if line.isspace():
                continue
            try:
                row = json.loads(line.rstrip())
            except ValueError as error:
                found = f"{place} is not valid JSON ({one_line(error)})"
                raise PuzzleError(f"data.source: {found}; correct or delete the line") from None
            yield Document(_content(row, column, place), place, len(line))


def _content(row: object, column: str, place: str) -> str | Messages:
    """The text or conversation in a row's column; null is an empty text."""
    if not isinstance(row, dict):
        raise PuzzleError(f"data.source: {place} is a {type(row).__name__}, not an object with a column {column!r}")
    _check_column(column, row, place)
    content = "" if row[column] is None else row[column]
    if isinstance(content, str) or (
        isinstance(content, list)
        and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in content)
    ):
        return content
    raise PuzzleError(
        f"data.column: {place} holds a {type(content).__name__} in {column!r} that is neither text nor a list of "
        "messages with role and content; name another column"
    )


def _check_column(column: str, names: Iterable[str], place: str) -> None:
    if column not in (names := sorted(names)):
        found = ", ".join(names) or "none"
        raise PuzzleError(f"data.column: {place} has no column {column!r}; it has {found}: name one of those")
