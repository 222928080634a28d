"""From a name or a configuration entry back to a variant. One line a kind."""

import re
from typing import Any

from puzzle.blocks.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.blocks.ffn import GatedFFN, LinearFFN, NoFFN
from puzzle.blocks.variants import Half, Variant
from puzzle.errors import PuzzleError

REGISTRY: dict[Half, dict[str, type[Variant]]] = {
    "attention": {kind.kind: kind for kind in (GroupedQuery, LinearAttention, NoAttention)},
    "ffn": {kind.kind: kind for kind in (GatedFFN, LinearFFN, NoFFN)},
}

_SIZED: dict[Half, tuple[str, type[GroupedQuery] | type[GatedFFN]]] = {
    "attention": ("kv", GroupedQuery),
    "ffn": ("w", GatedFFN),
}


def parse_variant(half: Half, name: str) -> Variant:
    """`kv2` or `w512`, or a kind without sizes: `linear`, `none`; a `PuzzleError` for anything else."""
    prefix, sized = _SIZED[half]
    if match := re.fullmatch(rf"{prefix}([1-9][0-9]*)", name):
        return sized(int(match[1]))
    kind = REGISTRY[half].get(name)
    if kind is None or kind is sized:
        plain = ", ".join(name for name, kind in REGISTRY[half].items() if kind is not sized)
        raise PuzzleError(f"{half} variant {name!r} is unknown; use {prefix}<number>, {plain}")
    return kind()


def variant_from_config(half: Half, entry: dict[str, Any]) -> Variant:
    """The variant that `entry`, one half of an entry of `PuzzleConfig.blocks`, describes."""
    sizes = [value for name, value in entry.items() if name != "kind"]
    return REGISTRY[half][entry["kind"]](*sizes)
