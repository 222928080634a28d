"""Law 6: generation with the KV cache equals generation without, also when layer 0 has no attention."""

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from puzzle.modeling import PuzzleForCausalLM

ATTENTION = ("kv4", "kv2", "kv1", "linear", "none")
FFN = ("w48", "w16", "linear", "none")
OWN = "kv4+w48"
NEW_TOKENS = 4


def architectures() -> dict[str, tuple[str, ...]]:
    """Every variant first, in the middle and last, and models with little or no attention left."""
    blocks = [f"{attention}+w48" for attention in ATTENTION[1:]] + [f"kv4+{ffn}" for ffn in FFN[1:]] + ["none+none"]
    found = {}
    for block in blocks:
        for position in range(3):
            layers = [OWN, OWN, OWN]
            layers[position] = block
            found[f"{block} in layer {position}"] = tuple(layers)
    found["every kind at once"] = ("none+w16", "kv1+none", "linear+linear", "kv2+w48", "none+none")
    found["attention last only"] = ("none+none", "linear+w48", "kv2+w48")
    found["no attention, ffn"] = ("none+w48", "none+w16")
    found["no attention, linear"] = ("linear+w48", "linear+none")
    found["nothing at all"] = ("none+none", "none+none")
    return found


@pytest.fixture(params=architectures().values(), ids=architectures(), scope="module")
def model(request: pytest.FixtureRequest) -> PuzzleForCausalLM:
    return pico_puzzle(*request.param)


def padded() -> tuple[Tensor, Tensor]:
    """A batch whose first row is padded on the left, and its mask."""
    tokens_BT = random_tokens(2, 7)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :3] = 0
    return tokens_BT, mask_BT


def generate(model: PuzzleForCausalLM, tokens_BT: Tensor, mask_BT: Tensor, **cache: object) -> tuple[Tensor, Tensor]:
    """The greedy text, and the logits that it was chosen by, [B, NEW_TOKENS, V]."""
    output = model.generate(
        tokens_BT,
        attention_mask=mask_BT,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **cache,
    )
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generation_with_the_cache_equals_generation_without(
    model: PuzzleForCausalLM, cache_implementation: str
) -> None:
    text, logits_BTV = generate(model, *padded(), use_cache=False)
    cached_text, cached_logits_BTV = generate(model, *padded(), cache_implementation=cache_implementation)
    assert torch.equal(cached_text, text)
    torch.testing.assert_close(cached_logits_BTV, logits_BTV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (5, 1, 1, 1, 1), (1,) * 9])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_without_position_ids_equal_one_forward(
    model: PuzzleForCausalLM, chunks: tuple[int, ...], kind: str
) -> None:
    tokens_BT = random_tokens(2, 9)
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=12)
    )
    steps = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens_BT.split(chunks, dim=1)]
    expected_BTV = model(tokens_BT, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, dim=1), expected_BTV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model: PuzzleForCausalLM) -> None:
    tokens_BT, mask_BT = padded()
    text, logits_BTV = generate(model, tokens_BT, mask_BT)
    alone_text, alone_logits_BTV = generate(model, tokens_BT[:1, 3:], mask_BT[:1, 3:])
    assert torch.equal(text[:1, 3:], alone_text)
    torch.testing.assert_close(logits_BTV[:1], alone_logits_BTV, rtol=1e-4, atol=1e-4)


def test_the_cache_holds_what_each_layer_needs_and_no_more() -> None:
    model = pico_puzzle("none+w16", "kv1+none", "linear+linear", "kv2+w48", "none+none")
    cache = model(random_tokens(2, 5)).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 5, 12), (2, 2, 5, 12)]
