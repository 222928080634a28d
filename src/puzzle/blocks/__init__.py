"""Blocks: the variants, one block's choice, the space, and modules built from them."""

from puzzle.blocks.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.blocks.ffn import GatedFFN, LinearFFN, NoFFN
from puzzle.blocks.modules import (
    build_subblock,
    num_params,
    split_state,
    weight_bytes,
)
from puzzle.blocks.registry import REGISTRY, parse_variant, variant_from_config
from puzzle.blocks.space import Architecture, BlockVariant, LayerSpace, Space, derive_space, hardware_multiple
from puzzle.blocks.variants import Half, ParentSubblock, State, Variant

__all__ = [
    "REGISTRY",
    "Architecture",
    "BlockVariant",
    "GatedFFN",
    "GroupedQuery",
    "Half",
    "LayerSpace",
    "LinearAttention",
    "LinearFFN",
    "NoAttention",
    "NoFFN",
    "ParentSubblock",
    "Space",
    "State",
    "Variant",
    "build_subblock",
    "derive_space",
    "hardware_multiple",
    "num_params",
    "parse_variant",
    "split_state",
    "variant_from_config",
    "weight_bytes",
]
