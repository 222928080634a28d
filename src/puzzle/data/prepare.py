"""The stage: sources to packed tokens, each document in one of five ranges."""

import hashlib
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from puzzle.data.packing import Encoder, Record, pack
from puzzle.data.sources import open_sources
from puzzle.data.tokens import RANGES, RangeCounts, RangeName, TokenData
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import DataSettings
from puzzle.runs import Run, StageFolder, digest

_VERSION = 1
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken"),
)


def prepare_data(run: Run, parent: Parent) -> TokenData:
    """The recipe's text as packed tokens of the parent's tokenizer; made if it is not there, opened if it is."""
    settings = run.recipe.data
    shares = range_shares(settings)
    sources = open_sources(settings, run.path / "sources.json")
    stage = run.stage(
        "data",
        version=_VERSION,
        settings=settings.model_dump(mode="json", exclude={"source"}),  # where the text lies does not matter
        inputs=[_tokenizer_address(parent.path), sources.address],
    )
    if not stage.done:
        encoder = Encoder(parent.tokenizer(), parent.config.vocab_size)
        record = pack(
            sources.parts,
            encoder,
            stage.path,
            bounds=dict(zip(shares, accumulate(shares.values()), strict=True)),
            sequence_length=settings.sequence_length,
            max_tokens=settings.max_tokens,
        )
        counts = _count(record, settings.sequence_length)
        _check_filled(counts, shares, settings)
        _log(run, counts)
        stage.commit(
            dtype="uint32, little endian",
            sequence_length=settings.sequence_length,
            eos_token_id=encoder.eos_token_id,
            source=settings.source,
            ranges={name: asdict(count) for name, count in counts.items()},
        )
    return _open(stage)


def range_shares(settings: DataSettings) -> dict[RangeName, float]:
    """Each range's share of the documents; training takes what the others leave."""
    shares: dict[RangeName, float] = {
        "calibration": settings.calibration,
        "validation": settings.validation,
        "scoring": settings.scoring,
        "test": settings.test,
    }
    return shares | {"training": 1 - sum(shares.values())}


def _open(stage: StageFolder) -> TokenData:
    facts = stage.facts
    counts = {name: RangeCounts(**facts["ranges"][name]) for name in RANGES}
    return TokenData(stage.path, stage.address, facts["sequence_length"], counts)


def _count(record: Record, sequence_length: int) -> dict[RangeName, RangeCounts]:
    return {
        name: RangeCounts(record.documents[name], record.tokens[name], record.tokens[name] // (sequence_length + 1))
        for name in RANGES
    }


def _check_filled(counts: dict[RangeName, RangeCounts], shares: dict[RangeName, float], settings: DataSettings) -> None:
    """Refuse a text that leaves a range empty."""
    num_documents = sum(count.documents for count in counts.values())
    if num_documents == 0:
        raise PuzzleError(f"data.source: {settings.source} holds no text; its documents are all empty")
    for name, share in shares.items():
        if counts[name].sequences == 0:
            remedies = [
                "lower the other shares" if name == "training" else f"raise data.{name}",
                *(["raise data.max_tokens"] if settings.max_tokens else []),
                "lower data.sequence_length",
            ]
            raise PuzzleError(
                f"data: {name} gets {counts[name].documents} of {num_documents} documents (its share is {share:.0%}), "
                f"which is not one sequence of {settings.sequence_length + 1} tokens; {', '.join(remedies)}, "
                "or give more documents (files, rows)"
            )


def _log(run: Run, counts: dict[RangeName, RangeCounts]) -> None:
    documents, tokens = (sum(getattr(count, name) for count in counts.values()) for name in ("documents", "tokens"))
    parts = ", ".join(f"{name} {count.sequences}" for name, count in counts.items())
    run.log(f"data: {documents} documents, {tokens} tokens; sequences: {parts}")


def _tokenizer_address(path: Path) -> str:
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})
    return digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
