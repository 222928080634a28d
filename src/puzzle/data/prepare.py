"""The stage: sources to packed tokens, each document in one of five ranges."""

import hashlib
import shutil
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from puzzle.data.packing import Encoder, join, tokenise
from puzzle.data.sources import open_sources
from puzzle.data.tokens import RANGES, RangeCounts, RangeName, TokenData
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import DataSettings
from puzzle.runs import Run, digest
from puzzle.stages import DATA

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken"),
)


def prepare_data(run: Run, parent: Parent) -> TokenData:
    """The recipe's text as packed tokens of the parent's tokenizer; made if it is not there, opened if it is."""
    settings = run.recipe.data
    sources = open_sources(settings, run.path / "sources.json")
    identities = digest([source.identity for source in sources])  # where the text lies does not matter
    stage = run.open(DATA, tokenizer=_tokenizer_address(parent.path), sources=identities)
    if not stage.done:
        shares: dict[RangeName, float] = {name: getattr(settings, name) for name in RANGES if name != "training"}
        bounds = dict(zip(shares, accumulate(shares.values()), strict=True))  # training takes what the others leave
        encoder = Encoder(parent.tokenizer(), parent.config.vocab_size)
        pieces = stage.path / "pieces"
        num_pieces = tokenise(sources, encoder, pieces, bounds, settings.max_tokens)
        counts = join(pieces, num_pieces, stage.path, settings.sequence_length)
        _check_filled(counts, shares | {"training": 1 - sum(shares.values())}, settings)
        documents, tokens = (sum(getattr(count, name) for count in counts.values()) for name in ("documents", "tokens"))
        sequences = ", ".join(f"{name} {count.sequences}" for name, count in counts.items())
        run.log(f"data: {documents} documents, {tokens} tokens; sequences: {sequences}")
        stage.commit(
            dtype="uint32, little endian",
            sequence_length=settings.sequence_length,
            eos_token_id=encoder.tokenizer.eos_token_id,
            ranges={name: asdict(count) for name, count in counts.items()},
        )
        shutil.rmtree(pieces)
    counts = {name: RangeCounts(**count) for name, count in stage.facts["ranges"].items()}
    return TokenData(stage.path, stage.address, stage.facts["sequence_length"], counts)


def _check_filled(counts: dict[RangeName, RangeCounts], shares: dict[RangeName, float], settings: DataSettings) -> None:
    """Refuse a text that leaves a range empty."""
    num_documents = sum(count.documents for count in counts.values())
    if num_documents == 0:
        raise PuzzleError(f"data.source: {', '.join(settings.source)} holds no text; its documents are all empty")
    for name, share in shares.items():
        if counts[name].sequences == 0:
            raise_it = "lower the other shares" if name == "training" else f"raise data.{name}"
            limit = ", raise data.max_tokens" if settings.max_tokens else ""
            raise PuzzleError(
                f"data: {name} gets {counts[name].documents} of {num_documents} documents (its share is {share:.0%}), "
                f"which is not one sequence of {settings.sequence_length + 1} tokens; {raise_it}{limit}, "
                "lower data.sequence_length, or give more documents (files, rows)"
            )


def _tokenizer_address(path: Path) -> str:
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    return digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
