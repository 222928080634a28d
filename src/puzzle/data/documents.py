"""Documents out of files: plain text, jsonl and parquet."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

from puzzle.errors import PuzzleError, one_line

Messages = list[dict[str, Any]]
"""A conversation, `[{"role": "user", "content": "..."}, ...]`."""

_CUT_BYTES = 256 * 2**10
_PARQUET_ROWS = 256  # a batch of rows held in memory


@dataclass(frozen=True)
class Document:
    """One text, or one conversation that the chat template will turn into text."""

    content: str | Messages
    place: str
    """Where it stands, for messages: a file, `file:line`, `file row N`."""
    share: float
    """Its part of the size of what it stands in."""


def read_text(path: Path, column: str) -> Iterator[Document]:
    """A file as one document; one above 256 KiB as even pieces of about that size, cut at line ends."""
    size = path.stat().st_size
    piece = max(1, ceil(size / max(1, ceil(size / _CUT_BYTES))))
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a character that a cut splits goes to the next piece
    with path.open("rb") as file:
        while data := file.read(piece):
            if len(data) == piece:
                data += file.readline(piece)  # bounded, for a file that is one endless line
            yield Document(decoder.decode(data), str(path), len(data))


def read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """A document a line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                place = f"{path}:{number}"
                yield Document(cell(_parse(line.rstrip(), place), column, place), place, len(line))


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    """A document a row; only `column` is read."""
    arrow, parquet = (import_extra(name, f"data.source: {path}") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(path) as file:
            check_column(column, file.schema_arrow.names, str(path))
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            batches = file.iter_batches(_PARQUET_ROWS, columns=[column])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                place = f"{path} row {number}"
                yield Document(cell(row, column, place), place, share)
    except (arrow.ArrowException, OSError) as error:
        raise PuzzleError(f"data.source: {path} is not a sound parquet file: {one_line(error)}") from None


_TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java", ".jl", ".js", ".jsx", ".kt"),
    *(".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx"),
)
READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    **dict.fromkeys(_TEXT_SUFFIXES, read_text),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
"""How a file is read, by its suffix in lower case."""


def cell(row: object, column: str, place: str) -> str | Messages:
    """The text or conversation in a row's column; nothing at all is an empty text."""
    if not isinstance(row, dict):
        raise PuzzleError(f"data.source: {place} is a {type(row).__name__}, not an object with a column {column!r}")
    check_column(column, row, place)
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, list) and all(map(_is_message, value))):
        return value
    raise PuzzleError(
        f"data.column: {place} holds a {type(value).__name__} in {column!r} that is neither text nor a list of "
        "messages with role and content; name another column"
    )


def check_column(column: str, names: Iterable[str], place: str) -> None:
    """Refuse a row or table without `column`."""
    if column not in (names := sorted(names)):
        raise PuzzleError(
            f"data.column: {place} has no column {column!r}; it has {', '.join(names) or 'none'}: name one of those"
        )


def import_extra(module: str, wanted_by: str) -> Any:
    """A module that comes with the extra `data`."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise PuzzleError(f"{wanted_by} needs the package {package}: pip install 'puzzle-llm[data]'") from None


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _parse(line: bytes, place: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise PuzzleError(
            f"data.source: {place} is not valid JSON ({one_line(error)}); mend or delete the line"
        ) from None
