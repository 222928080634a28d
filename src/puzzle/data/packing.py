"""Tokenising and packing, batch by batch of documents, so that it can be cut off at any moment and go on.

One file a range is only ever appended to. After each batch the files are flushed to disk, then a small record of how
far they count is replaced atomically. Whatever a file holds beyond the record was written by a batch that was cut off;
it is truncated and made again.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from puzzle.data.documents import Document
from puzzle.data.sources import Part
from puzzle.data.tokens import RANGES, TOKEN_DTYPE, RangeName, range_file
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import progress, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 2**20  # at worst, a token a character, 300 MB in the tokenizer
_RECORD = "progress.json"


@dataclass
class Record:
    """How far tokenising has come; all that it counts is on disk."""

    part: int = 0
    document: int = 0
    """Number within the part of the next document to read."""
    read: float = 0.0
    """Shares of the documents read, for the progress bar."""
    documents: dict[RangeName, int] = field(default_factory=lambda: dict.fromkeys(RANGES, 0))
    tokens: dict[RangeName, int] = field(default_factory=lambda: dict.fromkeys(RANGES, 0))

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())


@dataclass(frozen=True)
class Text:
    """A document's text, and where reading goes on after it."""

    text: str
    is_chat: bool
    share: float
    part: int
    next_document: int


class Encoder:
    """The parent's tokenizer, checked against its model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise PuzzleError("parent: its tokenizer has no EOS token to join documents with; set eos_token in it")
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_token_id = int(tokenizer.eos_token_id)

    def render(self, document: Document) -> str:
        """The document's text, conversations through the chat template; empty if there is nothing but white space."""
        text = document.content if isinstance(document.content, str) else self._render_chat(document)
        # JSON may hold half of a surrogate pair, which is no text and which tokenizers refuse.
        return text.encode("utf-8", "replace").decode() if text.strip() else ""

    def encode(self, texts: list[str], is_chat: bool) -> list[NDArray[np.int64]]:
        """Each text's tokens with EOS at the end; BOS only where the tokenizer, or the chat template, puts it."""
        encoded = self.tokenizer(texts, add_special_tokens=not is_chat, return_attention_mask=False, verbose=False)
        return [self._finish(np.array(ids, dtype=np.int64)) for ids in encoded["input_ids"]]

    def _finish(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if ids.size == 0 or ids[-1] != self.eos_token_id:
            ids = np.append(ids, self.eos_token_id)
        if (highest := ids.max()) >= self._vocab_size:
            raise PuzzleError(
                f"parent: its tokenizer gives token {highest}, its config.json has vocab_size {self._vocab_size}; "
                "use the tokenizer that belongs to the checkpoint"
            )
        return ids

    def _render_chat(self, document: Document) -> str:
        if not document.content:
            return ""
        if not self.tokenizer.chat_template:
            raise PuzzleError(
                f"data.column: {document.place} holds messages, and the parent's tokenizer has no chat template; "
                "give plain text, or a parent with one"
            )
        try:
            return str(self.tokenizer.apply_chat_template(document.content, tokenize=False))
        except Exception as error:  # templates raise what they like, the reader needs one line
            raise PuzzleError(f"data.source: {document.place} fits no chat template: {one_line(error)}") from None


def pack(
    parts: Sequence[Part],
    encoder: Encoder,
    folder: Path,
    *,
    bounds: Mapping[RangeName, float],
    sequence_length: int,
    max_tokens: int | None,
) -> Record:
    """Tokenise the parts into one file a range, from where an earlier start was cut off.

    Args:
        bounds: a document whose hash in [0, 1) is below a range's bound, and no earlier one's, goes to that range.
        max_tokens: stop after the document that reaches so many.
    """
    record = _read_record(folder)
    limit = max_tokens or float("inf")
    total, done = (limit, record.num_tokens) if max_tokens else (sum(part.size for part in parts), record.read)
    with _open_files(folder, record) as files, progress("tokenising", total, done) as bar:
        for batch in _batches(_texts(parts, encoder, record)):
            before = record.num_tokens, record.read
            _append(batch, encoder, bounds, limit, files, record)
            _save(files, record, folder)
            bar.advance(record.num_tokens - before[0] if max_tokens else record.read - before[1])
            if record.num_tokens >= limit:
                break
        _drop_tails(files, record, sequence_length, folder, len(parts))
    return record


def range_of(text: str, bounds: Mapping[RangeName, float]) -> RangeName:
    """The range of a document, by a hash of its text: the same text is never in two ranges."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return next((name for name, bound in bounds.items() if place < bound), "training")  # sums round


def _texts(parts: Sequence[Part], encoder: Encoder, record: Record) -> Iterator[Text]:
    """The texts that are not empty, from where the record stands."""
    first_part, first_document = record.part, record.document
    for index, part in enumerate(parts[first_part:], first_part):
        start = first_document if index == first_part else 0
        for number, document in enumerate(part.documents(start), start + 1):
            if text := encoder.render(document):
                yield Text(text, not isinstance(document.content, str), document.share, index, number)


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Texts of one kind, about `_BATCH_CHARACTERS` together."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        if batch and (size >= _BATCH_CHARACTERS or text.is_chat != batch[0].is_chat):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text.text)
    if batch:
        yield batch


def _append(
    batch: list[Text],
    encoder: Encoder,
    bounds: Mapping[RangeName, float],
    limit: float,
    files: Mapping[RangeName, BinaryIO],
    record: Record,
) -> None:
    encoded = encoder.encode([text.text for text in batch], batch[0].is_chat)
    for text, ids in zip(batch, encoded, strict=True):
        name = range_of(text.text, bounds)
        files[name].write(ids.astype(TOKEN_DTYPE).tobytes())
        record.documents[name] += 1
        record.tokens[name] += len(ids)
        record.part, record.document = text.part, text.next_document
        record.read += text.share
        if record.num_tokens >= limit:
            return


def _save(files: Mapping[RangeName, BinaryIO], record: Record, folder: Path) -> None:
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / _RECORD, asdict(record))


def _drop_tails(
    files: Mapping[RangeName, BinaryIO], record: Record, sequence_length: int, folder: Path, num_parts: int
) -> None:
    """Keep whole sequences; the record goes first, so that what is cut off here is cut off again on resume."""
    for name, tokens in record.tokens.items():
        record.tokens[name] = tokens - tokens % (sequence_length + 1)
    record.part, record.document = num_parts, 0
    _save(files, record, folder)
    _truncate(files, record)


def _read_record(folder: Path) -> Record:
    path = folder / _RECORD
    return Record(**read_json(path)) if path.exists() else Record()


@contextmanager
def _open_files(folder: Path, record: Record) -> Iterator[dict[RangeName, BinaryIO]]:
    """The ranges' files for appending, without what goes beyond the record."""
    with ExitStack() as stack:
        files: dict[RangeName, BinaryIO] = {
            name: stack.enter_context(range_file(folder, name).open("ab")) for name in RANGES
        }
        _truncate(files, record)
        yield files


def _truncate(files: Mapping[RangeName, BinaryIO], record: Record) -> None:
    for name, file in files.items():
        size = record.tokens[name] * TOKEN_DTYPE.itemsize
        if os.fstat(file.fileno()).st_size < size:
            raise PuzzleError(f"data: {file.name} is shorter than its record says; delete its folder to start over")
        file.truncate(size)
