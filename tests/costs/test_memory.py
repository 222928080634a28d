"""Law 10: predicted bytes are the bytes that a realised model allocates."""

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from transformers import DynamicCache

from puzzle.costs import fixed_memory, subblock_memory
from puzzle.modeling import PuzzleForCausalLM
from puzzle.variants import Architecture

BATCH, PROMPT, GENERATED = 3, 7, 5
ARCHITECTURES = [
    ("kv4+w48", "kv4+w48"),
    ("none+w24", "kv2+none", "kv1+linear", "kv4+w8"),  # no attention in layer 0
    ("linear+linear", "none+none", "kv2+w48"),
    ("none+none", "none+w16"),  # no cache at all
    ("kv2win4+w48", "none+w8", "kv4win4s2+none", "kv1win5s3+w48"),  # reached in the prompt
    ("kv2win9+w48", "kv4+none", "kv1win8s2+w48"),  # reached while generating
    ("kv2win64s4+w48", "kv4win13+w8"),  # never reached, the latter by one token
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("blocks", ARCHITECTURES)
def test_predicted_bytes_are_the_allocated_ones(
    blocks: tuple[str, ...], overrides: dict[str, object], dtype: torch.dtype
) -> None:
    model = pico_puzzle(*blocks, **overrides).to(dtype)
    cost = fixed_memory(model.config, dtype)
    for block in Architecture.of(model.config).blocks:
        for variant in block.subblocks:
            cost = cost + subblock_memory(variant, model.config, dtype, PROMPT + GENERATED)

    parameters = list(model.parameters())
    assert cost.params == sum(parameter.numel() for parameter in parameters)
    assert cost.weight_bytes == sum(parameter.nbytes for parameter in parameters)
    assert cost.kv_bytes_per_sequence * BATCH == cache_bytes(model)


@torch.no_grad()
def cache_bytes(model: PuzzleForCausalLM) -> int:
    """Of a batch at full length, after a prefill and all decode steps."""
    cache = DynamicCache(config=model.config)
    model(random_tokens(BATCH, PROMPT), past_key_values=cache, use_cache=True)
    for _ in range(GENERATED):
        model(random_tokens(BATCH, 1), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
