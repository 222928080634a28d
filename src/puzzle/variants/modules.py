"""A layer's state by subblock; and the names from before `Variant.build`, until nobody uses them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import FAMILIES, MODULE_NAMES, PuzzleConfig, PuzzleDecoderLayer
from puzzle.variants.base import State, Subblock, Variant


def build_subblock(
    variant: Variant, config: PuzzleConfig, state: Mapping[str, Tensor] | None = None, cache_index: int = 0
) -> PuzzleDecoderLayer:
    return variant.build(config, state, cache_index)


def contribution(
    layer: PuzzleDecoderLayer, subblock: Subblock, hidden_BTD: Tensor, context: Mapping[str, Any]
) -> Tensor:
    return layer.subblock_output(subblock, hidden_BTD, **context)


def num_params(variant: Variant, config: PuzzleConfig) -> int:
    return variant.num_params(config)


def weight_bytes(variant: Variant, config: PuzzleConfig, dtype: torch.dtype) -> int:
    return variant.weight_bytes(config, dtype)


def split_state(layer_state: Mapping[str, Tensor], subblock: Subblock) -> State:
    """The tensors of one subblock, its norm included, out of a whole layer's."""
    norms = {family.norm_names[subblock] for family in FAMILIES.values()}
    parts = (*norms, MODULE_NAMES[subblock])
    return {name: tensor for name, tensor in layer_state.items() if name.split(".")[0] in parts}
