"""The index of the block library: what was initialised and trained, and where its weights are."""

from dataclasses import dataclass
from functools import cached_property

from puzzle.artefacts.artefact import Artefact


@dataclass(frozen=True, kw_only=True)
class LibraryRow:
    """One variant of one subblock of one layer, or a whole block. Losses are normalised MSE on held-out text:
    E||y - y'||^2 / E||y||^2 (docs/numbers.md).
    """

    layer: int
    subblock: str
    """`attention`, `ffn`; `block` for one that was trained as a whole."""
    variant: str
    file: str
    """Its weights, relative to the run folder; empty for a variant without weights."""
    widened_from: str
    """The narrower variant whose weights these are, to be widened, where it ended better; else empty."""
    initial_loss: float
    loss: float
    """After training; never above `initial_loss`."""
    trained_tokens: int


@dataclass(frozen=True, kw_only=True)
class LibraryIndex(Artefact):
    """One row per layer, subblock and variant other than the parent's own."""

    rows: tuple[LibraryRow, ...]

    @cached_property
    def _by_key(self) -> dict[tuple[int, str, str], LibraryRow]:
        return {(row.layer, row.subblock, row.variant): row for row in self.rows}

    def row(self, layer: int, subblock: str, variant: str) -> LibraryRow:
        return self._by_key[layer, subblock, variant]

    def find(self, layer: int, subblock: str, variant: str) -> LibraryRow | None:
        return self._by_key.get((layer, subblock, variant))
