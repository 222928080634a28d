"""The stage: sources to packed tokens, each document in one of five ranges.

Documents are tokenised batch by batch and appended to the ranges' files; `position.json` says how far these are valid,
so that a run that is cut off at any moment goes on with the next batch and ends with the same bytes.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puzzle.data.read import Document, Source, open_sources
from puzzle.data.sample import sample_text
from puzzle.data.tokens import RANGES, TOKEN_DTYPE, RangeName, TokenData, write_at
from puzzle.errors import PuzzleError, one_line
from puzzle.modeling import TOKENIZER_FILES
from puzzle.parents import Parent
from puzzle.recipe import DataSettings
from puzzle.runs import Run, digest, file_digest, progress, read_json, write_json
from puzzle.stages import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 2**20  # at worst, a token a character, 300 MB in the tokenizer


def prepare_data(run: Run, parent: Parent) -> TokenData:
    """The recipe's text as packed tokens of the parent's tokenizer; made if it is not there, opened if it is."""
    settings, sampled = run.recipe.data, sample_text(run, parent)
    source = [str(sampled) if name == "parent" else name for name in settings.source]
    settings = settings.model_copy(update={"source": source})
    sources = open_sources(settings, run.path / "sources.json")
    files = sorted({file for pattern in TOKENIZER_FILES for file in parent.path.glob(pattern) if file.is_file()})
    tokenizer = digest([[file.name, file_digest(file, {})] for file in files])
    identities = digest([source.identity for source in sources])  # where the text lies does not matter
    stage = run.open(DATA, tokenizer=tokenizer, sources=identities)
    if not stage.done:
        end = _pack(sources, parent, settings, stage.path)
        counts = {name: _cut(stage.path, end, name, settings) for name in RANGES}
        tokens = sum(counts.values()) * (settings.sequence_length + 1)
        sequences = ", ".join(f"{name} {count}" for name, count in counts.items())
        run.log(f"data: {sum(end.documents.values())} documents, {tokens} tokens; sequences: {sequences}")
        stage.commit(documents=end.documents, sequences=counts)
    return TokenData(stage.path, stage.address, settings.sequence_length, stage.facts["sequences"])


@dataclass(frozen=True)
class _Position:
    """Where tokenising goes on, and what the files hold until there."""

    source: int = 0
    document: int = 0
    """Number within the source of the next document to read."""
    size: float = 0.0
    """Of all documents before it."""
    documents: dict[RangeName, int] = field(default_factory=lambda: dict.fromkeys(RANGES, 0))
    tokens: dict[RangeName, int] = field(default_factory=lambda: dict.fromkeys(RANGES, 0))


def _pack(sources: Sequence[Source], parent: Parent, settings: DataSettings, folder: Path) -> _Position:
    """Write every document into its range's file, from where an earlier start was cut off; the position at the end."""
    tokenizer = parent.tokenizer()
    if tokenizer.eos_token_id is None:
        raise PuzzleError("parent: its tokenizer has no EOS token to join documents with; set eos_token in it")
    record = folder / "position.json"
    position = _Position(**read_json(record)) if record.exists() else _Position()
    written, limit = sum(position.tokens.values()), settings.max_tokens
    total, done = (limit, written) if limit else (sum(source.size() for source in sources), position.size)
    # Training takes what the others leave.
    names: list[RangeName] = [*(name for name in RANGES if name != "training"), "training"]
    bounds = [*accumulate(getattr(settings, name) for name in names[:-1])]
    with progress("tokenising", total, done) as bar:
        for texts, after in _batches(sources, tokenizer, position):
            if limit and written >= limit:
                break
            ids = _encode(texts, tokenizer, parent.config.vocab_size, settings.special_tokens)
            ends = written + np.cumsum([len(each) for each in ids])
            count = 1 + int(np.searchsorted(ends, limit or math.inf))  # with the document that reaches the limit
            # A document's range is given by a hash of its text in [0, 1): the same text is never in two ranges.
            hashes = [hashlib.sha256(text.encode()).digest()[:8] for text, _ in texts[:count]]
            shares = [int.from_bytes(each, "big") / 2**64 for each in hashes]
            places = np.searchsorted(bounds, shares, side="right")
            documents, tokens = dict(position.documents), dict(position.tokens)
            for index, name in enumerate(names):
                chosen = [each for each, place in zip(ids, places, strict=False) if place == index]
                inner = tokens[name] + np.cumsum([len(each) for each in chosen], dtype=np.int64)
                write_at(folder / f"{name}.bin", TOKEN_DTYPE.itemsize * tokens[name], b"".join(map(bytes, chosen)))
                write_at(folder / f"{name}.ends.bin", inner.itemsize * documents[name], inner.tobytes())
                documents[name] += len(chosen)
                tokens[name] += sum(map(len, chosen))
            before, position = position, replace(after, documents=documents, tokens=tokens)
            write_json(record, asdict(position))
            new = sum(tokens.values()) - written
            bar.advance(new if limit else position.size - before.size)
            written += new
    return position


def _batches(
    sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase", position: _Position
) -> Iterator[tuple[list[tuple[str, bool]], _Position]]:
    """From `position` on, texts that are not empty, each with whether it is a conversation; the position after them."""
    batch: list[tuple[str, bool]] = []
    characters, size, first = 0, position.size, position.document
    for index, source in enumerate(sources[position.source :], position.source):
        for number, document in enumerate(source.documents(first), first + 1):
            size += document.size
            if text := _render(document, tokenizer):
                batch.append((text, not isinstance(document.content, str)))
                characters += len(text)
            position = _Position(index, number, size)
            if characters >= _BATCH_CHARACTERS:
                yield batch, position
                batch, characters = [], 0
        first = 0
    if batch:
        yield batch, position


def _render(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The document's text, conversations through the chat template; empty if there is nothing but white space."""
    text, place = document.content, document.place
    if not isinstance(text, str):
        if text and not tokenizer.chat_template:
            found = f"{place} holds messages, and the parent's tokenizer has no chat template"
            raise PuzzleError(f"data.column: {found}; give plain text, or a parent with one")
        try:
            text = str(tokenizer.apply_chat_template(text, tokenize=False)) if text else ""
        except Exception as error:  # templates raise what they like, the reader needs one line
            raise PuzzleError(f"data.source: {place} fits no chat template: {one_line(error)}") from None
    # JSON may hold half of a surrogate pair, which is no text and which tokenizers refuse.
    return text.encode("utf-8", "replace").decode() if text.strip() else ""


def _encode(
    texts: Sequence[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase", vocab_size: int, special_tokens: bool
) -> list[NDArray[np.uint32]]:
    """Each text's tokens with EOS at the end; BOS only where the tokenizer, or the chat template, puts it."""
    encoded: list[list[int]] = []
    tokenize = partial(tokenizer, return_attention_mask=False, verbose=False)
    for is_chat, same in groupby(texts, itemgetter(1)):
        options = {"add_special_tokens": not is_chat, "split_special_tokens": not (is_chat or special_tokens)}
        encoded += tokenize([text for text, _ in same], **options)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded]
    found = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded]
    if (highest := max(map(max, found))) >= vocab_size:
        has = f"its tokenizer gives token {highest}, its config.json has vocab_size {vocab_size}"
        raise PuzzleError(f"parent: {has}; use the tokenizer that belongs to the checkpoint")
    return [np.array(ids, dtype=TOKEN_DTYPE) for ids in found]


def _cut(folder: Path, end: _Position, name: RangeName, settings: DataSettings) -> int:
    """Cut a range's file to whole sequences, and count them; refuse a text that leaves none."""
    length, num_documents = settings.sequence_length + 1, sum(end.documents.values())
    if num_documents == 0:
        raise PuzzleError(f"data.source: {', '.join(settings.source)} holds no text; its documents are all empty")
    sequences = end.tokens[name] // length
    if sequences == 0:
        cure = "lower the other shares" if name == "training" else f"raise data.{name}"
        cure += ", raise data.max_tokens" if settings.max_tokens else ""
        raise PuzzleError(
            f"data: {name} gets {end.documents[name]} of {num_documents} documents, which is not one sequence of "
            f"{length} tokens; {cure}, lower data.sequence_length, or give more documents (files, rows)"
        )
    write_at(folder / f"{name}.bin", TOKEN_DTYPE.itemsize * sequences * length, b"")
    return sequences
