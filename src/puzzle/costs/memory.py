"""The memory model: exact, from the real modules and the cache's real shapes (law 10)."""

import torch

from puzzle.artefacts import Cost
from puzzle.blocks import GroupedQuery, Variant, num_params
from puzzle.modeling import PuzzleConfig, empty_model


def subblock_memory(variant: Variant, config: PuzzleConfig, dtype: torch.dtype, tokens: int) -> Cost:
    """Parameters, weight bytes and KV bytes of one subblock, its norm and biases included.

    Args:
        dtype: in which weights and KV cache are held.
        tokens: of one sequence at full length, prompt and generated.
    """
    params = num_params(variant, config)
    return Cost(
        params=params,
        weight_bytes=params * dtype.itemsize,
        kv_bytes_per_sequence=_kv_values_per_token(variant, config) * dtype.itemsize * tokens,
    )


def fixed_memory(config: PuzzleConfig, dtype: torch.dtype) -> Cost:
    """What every child has: embeddings, final norm and head, a tied head counted once."""
    parameters = empty_model(config).named_parameters()
    params = sum(parameter.numel() for name, parameter in parameters if not name.startswith("model.layers."))
    return Cost(params=params, weight_bytes=params * dtype.itemsize)


def _kv_values_per_token(variant: Variant, config: PuzzleConfig) -> int:
    """Keys and values, `head_dim` each, of every KV head; the other kinds of attention cache nothing."""
    if not isinstance(variant, GroupedQuery):
        return 0
    assert config.head_dim is not None
    return 2 * variant.num_kv_heads * config.head_dim
