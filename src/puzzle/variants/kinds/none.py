"""A subblock that is left out: no parameters, no norm, no KV cache."""

from dataclasses import dataclass
from typing import Any, ClassVar

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Subblock, Variant
from puzzle.variants.registry import register


@dataclass(frozen=True)
class _Nothing(Variant):
    kind: ClassVar[str] = "none"
    grammar: ClassVar[str] = "none"
    closed_form: ClassVar[bool] = True
    absent: ClassVar[bool] = True

    @property
    def description(self) -> str:
        return "left out"

    def operations(self, config: PuzzleConfig, new: int, context: int) -> float:
        return 0.0

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return parent != self

    def share(self, parent: Variant) -> float | None:
        return 0.0

    @property
    def cell(self) -> str:
        return "no FFN" if self.subblock == "ffn" else "no attention"

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"no_op": True}

    def initialise(self, parent: ParentSubblock) -> State:
        return {}

    def expected_loss(self, parent: ParentSubblock, state: State) -> float | None:
        return 1.0


@register
@dataclass(frozen=True)
class NoAttention(_Nothing):
    subblock: ClassVar[Subblock] = "attention"


@register
@dataclass(frozen=True)
class NoFFN(_Nothing):
    subblock: ClassVar[Subblock] = "ffn"
