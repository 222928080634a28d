"""Blocks: the variants, one block's choice, the space, and modules built from them."""

from puzzle.variants.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.variants.base import SUBBLOCKS, ParentSubblock, Start, State, Subblock, Unsized, Variant
from puzzle.variants.ffn import GatedFFN, LinearFFN, LowRankFFN, NoFFN
from puzzle.variants.linear import damping
from puzzle.variants.modules import (
    build_subblock,
    contribution,
    num_params,
    split_state,
    weight_bytes,
)
from puzzle.variants.prune import expected_losses, prune_space
from puzzle.variants.registry import REGISTRY, parse_variant, register, variant_from_config
from puzzle.variants.space import Architecture, BlockVariant, LayerSpace, Space, derive_space, hardware_multiple

__all__ = [
    "REGISTRY",
    "SUBBLOCKS",
    "Architecture",
    "BlockVariant",
    "GatedFFN",
    "GroupedQuery",
    "LayerSpace",
    "LinearAttention",
    "LinearFFN",
    "LowRankFFN",
    "NoAttention",
    "NoFFN",
    "ParentSubblock",
    "Space",
    "Start",
    "State",
    "Subblock",
    "Unsized",
    "Variant",
    "build_subblock",
    "contribution",
    "damping",
    "derive_space",
    "expected_losses",
    "hardware_multiple",
    "num_params",
    "parse_variant",
    "prune_space",
    "register",
    "split_state",
    "variant_from_config",
    "weight_bytes",
]
