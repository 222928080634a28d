"""Modules of single subblocks, and what they weigh.

A subblock as a module is a decoder layer whose other subblock is `none`, so one implementation serves training,
scoring, measuring and the child.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer
from puzzle.variants.base import State, Subblock, Variant

_NONE = {"kind": "none"}
_ATTENTION_PREFIXES = ("input_layernorm.", "self_attn.")


def build_subblock(
    variant: Variant, config: PuzzleConfig, state: Mapping[str, Tensor] | None = None, cache_index: int = 0
) -> PuzzleDecoderLayer:
    """A decoder layer of this subblock alone, with the weights of `state` (shared, not copied), or on `meta`.

    Args:
        config: of a model that was built, so that the attention implementation is the one its masks are made for.
    """
    assert state is None or config._attn_implementation is not None, "build a model with this configuration first"
    block = {"attention": _NONE, "ffn": _NONE} | {variant.subblock: variant.module_config()}
    with torch.device("meta"):
        layer = PuzzleDecoderLayer(config, block, cache_index)
    if state is not None:
        layer.load_state_dict(dict(state), assign=True)
    return layer.eval()


def contribution(
    layer: PuzzleDecoderLayer, subblock: Subblock, hidden_BTD: Tensor, context: Mapping[str, Any]
) -> Tensor:
    """What one subblock of a layer adds to the residual stream, [B, T, D]; zeros where it has no such subblock."""
    if subblock == "attention" and layer.has_attention:
        return layer.attention_contribution(hidden_BTD, **context)
    if subblock == "ffn" and layer.has_ffn:
        return layer.ffn_contribution(hidden_BTD)
    return torch.zeros_like(hidden_BTD)


def num_params(variant: Variant, config: PuzzleConfig) -> int:
    """Parameters of the subblock, its norm and biases included."""
    return sum(parameter.numel() for parameter in build_subblock(variant, config).parameters())


def weight_bytes(variant: Variant, config: PuzzleConfig, dtype: torch.dtype) -> int:
    """Bytes of those parameters when the model is held in `dtype`."""
    return num_params(variant, config) * dtype.itemsize


def split_state(layer_state: Mapping[str, Tensor], subblock: Subblock) -> State:
    """The tensors of one subblock out of a whole layer's."""
    wanted = subblock == "attention"
    return {name: tensor for name, tensor in layer_state.items() if name.startswith(_ATTENTION_PREFIXES) == wanted}
