"""The index of the block library: what was initialised and trained, and where its weights are."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property

from puzzle.artefacts.costs import dump_rows


@dataclass(frozen=True, kw_only=True)
class LibraryRow:
    """One variant of one half of one layer. Losses are normalised MSE on held-out text: E||y - y'||^2 / E||y||^2."""

    layer: int
    half: str
    variant: str
    file: str
    """Its weights, relative to the library's folder; empty for a variant without weights."""
    initial_loss: float
    loss: float
    """After training; never above `initial_loss`."""
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class LibraryIndex:
    """One row per layer, half and variant other than the parent's own."""

    rows: tuple[LibraryRow, ...]

    @cached_property
    def _by_key(self) -> dict[tuple[int, str, str], LibraryRow]:
        return {(row.layer, row.half, row.variant): row for row in self.rows}

    def row(self, layer: int, half: str, variant: str) -> LibraryRow:
        return self._by_key[layer, half, variant]

    def to_json(self) -> str:
        return dump_rows({"format": 1}, (asdict(row) for row in self.rows))

    @classmethod
    def from_json(cls, text: str) -> "LibraryIndex":
        return cls(rows=tuple(LibraryRow(**row) for row in json.loads(text)["rows"]))
