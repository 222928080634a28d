"""The memory model: exact, from the real modules and the cache's real shapes (law 10)."""

import torch

from puzzle.artefacts import Cost
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.variants import Variant, num_params


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
        kv_bytes_per_sequence=variant.kv_values(config, tokens) * dtype.itemsize,
    )


def fixed_memory(config: PuzzleConfig, dtype: torch.dtype) -> Cost:
    """What every child has: embeddings, final norm and head, a tied head counted once."""
    parameters = empty_model(config).named_parameters()
    params = sum(parameter.numel() for name, parameter in parameters if not name.startswith("model.layers."))
    return Cost(params=params, weight_bytes=params * dtype.itemsize)
