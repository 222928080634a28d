"""Tokenising and packing.

Each batch of documents is tokenised and written as one file, so that a run that is cut off goes on with the next batch.
At the end, these pieces are joined to one file of tokens a range.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from puzzle.data.documents import Document, Messages
from puzzle.data.sources import Source
from puzzle.data.tokens import RANGES, TOKEN_DTYPE, RangeCounts, RangeName, ends_file, tokens_file
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import progress, read_json, read_tensors, write_atomically, write_json, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 2**20  # at worst, a token a character, 300 MB in the tokenizer


@dataclass(frozen=True)
class _Position:
    """Where tokenising goes on."""

    source: int = 0
    document: int = 0
    """Number within the source of the next document to read."""
    size: float = 0.0
    """Of all documents before it."""
    tokens: int = 0
    pieces: int = 0


@dataclass(frozen=True)
class _Text:
    text: str
    is_chat: bool
    next: _Position


@dataclass(frozen=True)
class Encoder:
    """The parent's tokenizer, checked against its model."""

    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise PuzzleError("parent: its tokenizer has no EOS token to join documents with; set eos_token in it")

    def render(self, document: Document) -> str:
        """The document's text, conversations through the chat template; empty if there is nothing but white space."""
        content = document.content
        text = content if isinstance(content, str) else self._render_chat(content, document.place)
        # JSON may hold half of a surrogate pair, which is no text and which tokenizers refuse.
        return text.encode("utf-8", "replace").decode() if text.strip() else ""

    def encode(self, texts: Sequence[_Text]) -> list[NDArray[np.uint32]]:
        """Each text's tokens with EOS at the end; BOS only where the tokenizer, or the chat template, puts it."""
        encoded: dict[int, NDArray[np.uint32]] = {}
        for kind in (False, True):
            chosen = {i: text.text for i, text in enumerate(texts) if text.is_chat == kind}
            if chosen:
                options = {"add_special_tokens": not kind, "return_attention_mask": False, "verbose": False}
                found = self.tokenizer(list(chosen.values()), **options)["input_ids"]
                encoded |= zip(chosen, map(self._finish, found), strict=True)
        return [encoded[i] for i in range(len(texts))]

    def _finish(self, ids: list[int]) -> NDArray[np.uint32]:
        eos = self.tokenizer.eos_token_id
        ids = ids if ids and ids[-1] == eos else [*ids, eos]
        if (highest := max(ids)) >= self.vocab_size:
            raise PuzzleError(
                f"parent: its tokenizer gives token {highest}, its config.json has vocab_size {self.vocab_size}; "
                "use the tokenizer that belongs to the checkpoint"
            )
        return np.array(ids, dtype=TOKEN_DTYPE)

    def _render_chat(self, messages: Messages, place: str) -> str:
        if messages and not self.tokenizer.chat_template:
            raise PuzzleError(
                f"data.column: {place} holds messages, and the parent's tokenizer has no chat template; "
                "give plain text, or a parent with one"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False)) if messages else ""
        except Exception as error:  # templates raise what they like, the reader needs one line
            raise PuzzleError(f"data.source: {place} fits no chat template: {one_line(error)}") from None


def tokenise(
    sources: Sequence[Source], encoder: Encoder, folder: Path, bounds: Mapping[RangeName, float], max_tokens: int | None
) -> int:
    """Write pieces into `folder`, from where an earlier start was cut off; their number.

    Args:
        bounds: a document whose hash in [0, 1) is below a range's bound, and no earlier one's, goes to that range.
        max_tokens: stop after the document that reaches so many.
    """
    folder.mkdir(exist_ok=True)
    record = folder / "position.json"
    position = _Position(**read_json(record)) if record.exists() else _Position()
    limit = max_tokens or math.inf
    total, done = (limit, position.tokens) if max_tokens else (sum(source.size() for source in sources), position.size)
    with progress("tokenising", total, done) as bar:
        for batch in _batches(sources, encoder, position):
            if position.tokens >= limit:
                break
            ids = encoder.encode(batch)
            ends = position.tokens + np.cumsum([len(each) for each in ids])
            count = 1 + int(np.searchsorted(ends, limit))  # with the document that reaches the limit
            batch, ids, ends = batch[:count], ids[:count], ends[:count]
            write_tensors(
                _piece(folder, position.pieces),
                {
                    "tokens": torch.from_numpy(np.concatenate(ids)),
                    "lengths": torch.tensor([len(each) for each in ids]),
                    "ranges": torch.tensor([RANGES.index(range_of(text.text, bounds)) for text in batch]),
                },
            )
            before, position = position, replace(batch[-1].next, tokens=int(ends[-1]), pieces=position.pieces + 1)
            write_json(record, asdict(position))
            bar.advance(position.tokens - before.tokens if max_tokens else position.size - before.size)
    return position.pieces


def join(folder: Path, num_pieces: int, out: Path, sequence_length: int) -> dict[RangeName, RangeCounts]:
    """Write each range's documents of all pieces into one file, in whole sequences, and where they end."""
    lengths: dict[RangeName, list[NDArray[np.int64]]] = {name: [] for name in RANGES}
    counts: dict[RangeName, RangeCounts] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(progress("packing", num_pieces))
        files = {name: stack.enter_context(tokens_file(out, name).open("wb")) for name in RANGES}
        for number in range(num_pieces):
            piece = {name: tensor.numpy() for name, tensor in read_tensors(_piece(folder, number)).items()}
            for index, name in enumerate(RANGES):
                chosen = piece["ranges"] == index
                lengths[name].append(piece["lengths"][chosen])
                files[name].write(piece["tokens"][np.repeat(chosen, piece["lengths"])].tobytes())
            bar.advance()
        for name, file in files.items():
            ends = np.cumsum(np.concatenate([*lengths[name], np.zeros(0, np.int64)]))
            sequences = int(ends[-1]) // (sequence_length + 1) if ends.size else 0
            counts[name] = RangeCounts(len(ends), sequences * (sequence_length + 1), sequences)
            file.truncate(counts[name].tokens * TOKEN_DTYPE.itemsize)
            file.flush()
            os.fsync(file.fileno())
            write_atomically(ends_file(out, name), ends.tofile)
    return counts


def range_of(text: str, bounds: Mapping[RangeName, float]) -> RangeName:
    """The range of a document, by a hash of its text: the same text is never in two ranges."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return next((name for name, bound in bounds.items() if place < bound), "training")  # sums round


def _piece(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _batches(sources: Sequence[Source], encoder: Encoder, position: _Position) -> Iterator[list[_Text]]:
    """The texts that are not empty, from `position` on, about `_BATCH_CHARACTERS` together."""
    batch: list[_Text] = []
    characters, size, first = 0, position.size, position.document
    for index, source in enumerate(sources[position.source :], position.source):
        for number, document in enumerate(source.documents(first), first + 1):
            size += document.size
            if text := encoder.render(document):
                batch.append(_Text(text, not isinstance(document.content, str), _Position(index, number, size)))
                characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        first = 0
    if batch:
        yield batch
