"""A subblock that is left out: no parameters, no norm, no KV cache."""

from dataclasses import dataclass
from typing import Any

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import ParentSubblock, State, Variant, register


@dataclass(frozen=True)
class _Nothing(Variant):
    kind = "none"
    grammar = "none"
    closed_form = True
    absent = True

    def fits(self, parent: Variant, config: PuzzleConfig) -> bool:
        return parent != self

    def deci(self, config: PuzzleConfig) -> dict[str, Any]:
        return {"no_op": True}

    def initialise(self, parent: ParentSubblock) -> State:
        return {}


@register
@dataclass(frozen=True)
class NoAttention(_Nothing):
    subblock = "attention"
    cell = "no attention"


@register
@dataclass(frozen=True)
class NoFFN(_Nothing):
    subblock = "ffn"
    cell = "no FFN"
