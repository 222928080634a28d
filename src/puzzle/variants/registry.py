"""Every kind of variant; from a name or a configuration entry back to a variant."""

from typing import Any

from puzzle.errors import PuzzleError
from puzzle.modeling import ATTENTION_MODULES, FFN_MODULES, ModuleBuilder
from puzzle.variants.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.variants.base import Subblock, Variant
from puzzle.variants.ffn import GatedFFN, LinearFFN, LowRankFFN, NoFFN

_BUILT_IN: dict[Subblock, tuple[type[Variant], ...]] = {
    "attention": (GroupedQuery, LinearAttention, NoAttention),
    "ffn": (GatedFFN, LowRankFFN, LinearFFN, NoFFN),
}
REGISTRY: dict[Subblock, dict[str, type[Variant]]] = {
    subblock: {variant.kind: variant for variant in variants} for subblock, variants in _BUILT_IN.items()
}


def register(variant: type[Variant], module: ModuleBuilder) -> None:
    """Add a kind of variant from outside this package; an own kind of the same name is replaced.

    Args:
        variant: its `kind` is what `PuzzleConfig.blocks` calls it; its names must be no other kind's.
        module: from the configuration and the variant's `module_config` to the module in place of the family's
            attention or FFN. Attention added this way has no KV cache.
    """
    if variant.kind in (built_in.kind for built_in in _BUILT_IN[variant.subblock]):
        raise PuzzleError(f"register: {variant.subblock} kind {variant.kind!r} is built in; name yours differently")
    REGISTRY[variant.subblock][variant.kind] = variant
    modules = ATTENTION_MODULES if variant.subblock == "attention" else FFN_MODULES
    modules[variant.kind] = module


def parse_variant(subblock: Subblock, name: str) -> Variant:
    """`kv2` or `w512`, or a kind without sizes: `linear`, `none`; a `PuzzleError` for anything else."""
    for kind in REGISTRY[subblock].values():
        if (variant := kind.parse(name)) is not None:
            return variant
    forms = ", ".join(kind.form() for kind in REGISTRY[subblock].values())
    raise PuzzleError(f"{subblock} variant {name!r} is unknown; use {forms}")


def variant_from_config(subblock: Subblock, entry: dict[str, Any]) -> Variant:
    """The variant that `entry`, one half of an entry of `PuzzleConfig.blocks`, describes."""
    kind = entry["kind"]
    if kind not in REGISTRY[subblock]:
        raise PuzzleError(
            f"blocks: {subblock} kind {kind!r} is unknown; use {', '.join(REGISTRY[subblock])}, "
            "or import the module that registers it first"
        )
    return REGISTRY[subblock][kind].from_config(entry)
