"""What the library holds, and the quality of every block composed of it, alone in the parent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from puzzle.artefacts.artefact import Artefact
from puzzle.errors import PuzzleError

ScoreName = Literal["kl", "lm_loss", "cosine", "task"]
"""What a search can add up, the lower the better."""


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


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """The parent with block `block` in place of its own in `layer`, on the scoring text (paper section 2.3)."""

    layer: int
    block: str
    kl: float
    """KL(parent || replaced) of the next-token distributions, nats per token."""
    kl_se: float
    """Standard error of `kl` over sequences."""
    lm_loss: float
    """Negative log-likelihood of the next token, nats per token. Where not all text was scored: the parent's on all of
    it, plus the mean difference on what was."""
    top1_agreement: float
    cosine: float
    """1 - cosine of the final hidden states to the parent's, after the last norm."""
    sequences: int
    """Scored; fewer than the table's where the score is estimated from those of its subblocks."""
    task: float | None = None
    """Of the user's own function, the higher the better; none where that was not finite."""


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Artefact):
    """One row per layer and composed block; the parent's own blocks have a KL of exactly 0. A block without a row was
    not finite and cannot be chosen.
    """

    num_layers: int
    sequences: int
    sequence_length: int
    rows: tuple[ScoreRow, ...]

    @cached_property
    def _by_key(self) -> dict[tuple[int, str], ScoreRow]:
        return {(row.layer, row.block): row for row in self.rows}

    def row(self, layer: int, block: str) -> ScoreRow:
        return self._by_key[layer, block]

    def layer(self, layer: int) -> list[ScoreRow]:
        return [row for row in self.rows if row.layer == layer]

    def parent_row(self, layer: int) -> ScoreRow:
        """The layer's row of the parent's own block: the first with a KL of exactly 0, others with 0 are ties."""
        found = next((row for row in self.layer(layer) if row.kl == 0), None)
        if found is None:
            raise PuzzleError(f"scores of layer {layer}: no block has a KL of 0 as the parent's has; score it again")
        return found

    def value(self, layer: int, block: str, score: ScoreName = "kl") -> float:
        """What the block takes away from the parent's quality; of the parent's own block exactly 0.

        `lm_loss` is the rise above the parent's, `task` the fall below it: both can be negative.
        """
        row = self.row(layer, block)
        if score in ("kl", "cosine"):
            return float(getattr(row, score))
        parent = self._parent_rows[layer]
        if score == "lm_loss":
            return row.lm_loss - parent.lm_loss
        assert row.task is not None, f"layer {layer} {block} has no task score"
        assert parent.task is not None, f"the parent has no task score in layer {layer}"
        return parent.task - row.task

    @cached_property
    def _parent_rows(self) -> list[ScoreRow]:
        return [self.parent_row(layer) for layer in range(self.num_layers)]

    def having(self, score: ScoreName) -> "ScoreTable":
        """The table of the blocks that have this score: all, unless it is `task`, which some may lack."""
        if score != "task":
            return self
        table = replace(self, rows=tuple(row for row in self.rows if row.task is not None))
        if not table.rows:
            raise PuzzleError(
                "search.score: found task, but no block has a task score; set score.task to `module:function` too"
            )
        return table

    def total(self, blocks: Sequence[str], score: ScoreName = "kl") -> float:
        """The additive estimate of an architecture's score: the sum over its blocks."""
        return sum(self.value(layer, block, score) for layer, block in enumerate(blocks))
