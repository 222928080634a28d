"""Quality of every composed block, alone in the parent."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from puzzle.artefacts.costs import dump_rows


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
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
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

    def total(self, blocks: Sequence[str]) -> float:
        """The additive estimate of an architecture's KL: the sum over its blocks."""
        return sum(self.row(layer, block).kl for layer, block in enumerate(blocks))

    def to_json(self) -> str:
        head = {
            "num_layers": self.num_layers,
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
        }
        return dump_rows(head, (asdict(row) for row in self.rows))

    @classmethod
    def from_json(cls, text: str) -> "ScoreTable":
        table = json.loads(text)
        rows = tuple(ScoreRow(**row) for row in table.pop("rows"))
        return cls(rows=rows, **table)
