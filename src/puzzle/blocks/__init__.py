"""Blocks: the variants, one block's choice, the space, and modules built from them."""

from puzzle.blocks.attention import GroupedQuery, LinearAttention, NoAttention
from puzzle.blocks.ffn import GatedFFN, LinearFFN, LowRankFFN, NoFFN
from puzzle.blocks.linear import damping
from puzzle.blocks.modules import (
    build_subblock,
    contribution,
    num_params,
    split_state,
    weight_bytes,
)
from puzzle.blocks.prune import expected_losses, prune_space
from puzzle.blocks.registry import REGISTRY, parse_variant, register, variant_from_config
from puzzle.blocks.space import Architecture, BlockVariant, LayerSpace, Space, derive_space, hardware_multiple
from puzzle.blocks.variants import HALVES, Half, ParentSubblock, Start, State, Unsized, Variant

__all__ = [
    "HALVES",
    "REGISTRY",
    "Architecture",
    "BlockVariant",
    "GatedFFN",
    "GroupedQuery",
    "Half",
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
