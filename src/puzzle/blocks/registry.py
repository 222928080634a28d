"""Every kind of variant; from a name or a configuration entry back to a variant."""

from typing import Any

from puzzle.blocks.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.blocks.ffn import GatedFFN, LinearFFN, LowRankFFN, NoFFN
from puzzle.blocks.variants import Half, Variant
from puzzle.errors import PuzzleError
from puzzle.modeling import ATTENTION_MODULES, FFN_MODULES, ModuleBuilder

_BUILT_IN: dict[Half, tuple[type[Variant], ...]] = {
    "attention": (GroupedQuery, LinearAttention, NoAttention),
    "ffn": (GatedFFN, LowRankFFN, LinearFFN, NoFFN),
}
REGISTRY: dict[Half, dict[str, type[Variant]]] = {
    half: {variant.kind: variant for variant in variants} for half, variants in _BUILT_IN.items()
}


def register(variant: type[Variant], module: ModuleBuilder) -> None:
    """Add a kind of variant from outside this package; an own kind of the same name is replaced.

    Args:
        variant: its `kind` is what `PuzzleConfig.blocks` calls it; its names must be no other kind's.
        module: from the configuration and the variant's `module_config` to the module in place of the family's
            attention or FFN. Attention added this way has no KV cache.
    """
    if variant.kind in (built_in.kind for built_in in _BUILT_IN[variant.half]):
        raise PuzzleError(f"register: {variant.half} kind {variant.kind!r} is built in; name yours differently")
    REGISTRY[variant.half][variant.kind] = variant
    modules = ATTENTION_MODULES if variant.half == "attention" else FFN_MODULES
    modules[variant.kind] = module


def parse_variant(half: Half, name: str) -> Variant:
    """`kv2` or `w512`, or a kind without sizes: `linear`, `none`; a `PuzzleError` for anything else."""
    for kind in REGISTRY[half].values():
        if (variant := kind.parse(name)) is not None:
            return variant
    forms = ", ".join(kind.form() for kind in REGISTRY[half].values())
    raise PuzzleError(f"{half} variant {name!r} is unknown; use {forms}")


def variant_from_config(half: Half, entry: dict[str, Any]) -> Variant:
    """The variant that `entry`, one half of an entry of `PuzzleConfig.blocks`, describes."""
    kind = entry["kind"]
    if kind not in REGISTRY[half]:
        raise PuzzleError(
            f"blocks: {half} kind {kind!r} is unknown; use {', '.join(REGISTRY[half])}, "
            "or import the module that registers it first"
        )
    return REGISTRY[half][kind].from_config(entry)
