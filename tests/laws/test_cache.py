"""Law 6: generation with the KV cache equals generation without, also when layer 0 has no attention or a window."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from puzzle.modeling import PuzzleForCausalLM

ATTENTION = ("kv4", "kv2", "kv1", "kv2q2", "linear", "none")
FFN = ("w48", "w16", "linear", "none")
OWN = "kv4+w48"
NEW_TOKENS = 4


def architectures() -> dict[str, tuple[str, ...]]:
    """Every variant first, in the middle and last, and models with little or no attention left."""
    blocks = [f"{attention}+w48" for attention in ATTENTION[1:]] + [f"kv4+{ffn}" for ffn in FFN[1:]] + ["none+none"]
    found = {f"{block} in layer {i}": (*[OWN] * i, block, *[OWN] * (2 - i)) for block in blocks for i in range(3)}
    found["every kind at once"] = ("none+w16", "kv1+none", "linear+linear", "kv2+w48", "none+none")
    found["attention last only"] = ("none+none", "linear+w48", "kv2+w48")
    found["no attention, ffn"] = ("none+w48", "none+w16")
    found["no attention, linear"] = ("linear+w48", "linear+none")
    found["nothing at all"] = ("none+none", "none+none")
    return found | windows("")


def windows(sinks: str) -> dict[str, tuple[str, ...]]:
    """Layers with windows that the tests' texts outgrow: in layer 0, alone, of two lengths, among the other kinds."""
    return {
        f"windows{sinks} {name}": tuple(block.replace("S", sinks) for block in blocks)
        for name, blocks in {
            "in layer 0": ("kv4win5S+w48", OWN),
            "alone": ("kv2win3S+w48", "kv2win3S+w16"),
            "between others": ("none+w16", OWN, "kv1win4S+none", "linear+w16"),
            "of two lengths": ("kv2win2S+w48", "none+none", "kv2q2win6S+w48", OWN),
        }.items()
    }


PLAIN, SINKS = architectures(), windows("s1") | windows("s3")
plain = pytest.mark.parametrize("blocks", PLAIN.values(), ids=PLAIN)
with_sinks = pytest.mark.parametrize("blocks", SINKS.values(), ids=SINKS)


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


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def check_generation(model: PuzzleForCausalLM, batch: tuple[Tensor, Tensor], **options: object) -> None:
    text, logits_BTV = generate(model, *batch, use_cache=False)
    for cache in ("dynamic", "static"):
        cached_text, cached_logits_BTV = generate(model, *batch, cache_implementation=cache, **options)
        assert torch.equal(cached_text, text)
        close(cached_logits_BTV, logits_BTV)


@torch.no_grad()
def check_steps(model: PuzzleForCausalLM, *caches: Callable[[PuzzleForCausalLM], Cache]) -> None:
    """Without position ids; the text in one chunk, in several, or token by token."""
    tokens_BT = random_tokens(2, 9)
    expected_BTV = model(tokens_BT, use_cache=False).logits
    for new_cache, chunks in product(caches, [(9,), (4, 5), (5, 1, 1, 1, 1), (1,) * 9]):
        cache = new_cache(model)
        steps = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens_BT.split(chunks, dim=1)]
        close(torch.cat(steps, dim=1), expected_BTV)


def dynamic(model: PuzzleForCausalLM) -> Cache:
    return DynamicCache(config=model.config)


def static(model: PuzzleForCausalLM) -> Cache:
    return StaticCache(config=model.config, max_cache_len=12)


@plain
def test_generation_and_steps_with_the_cache_equal_those_without(blocks: tuple[str, ...]) -> None:
    """And padding on the left changes nothing."""
    model, (tokens_BT, mask_BT) = pico_puzzle(*blocks), padded()
    check_generation(model, (tokens_BT, mask_BT))
    check_steps(model, dynamic, static)
    text, logits_BTV = generate(model, tokens_BT, mask_BT)
    alone_text, alone_logits_BTV = generate(model, tokens_BT[:1, 3:], mask_BT[:1, 3:])
    assert torch.equal(text[:1, 3:], alone_text)
    close(logits_BTV[:1], alone_logits_BTV)


@with_sinks
def test_generation_and_steps_with_sinks(blocks: tuple[str, ...]) -> None:
    """The window is reached in the prompt, in one of its chunks, or while the answer grows."""
    model = pico_puzzle(*blocks)
    for prompt, chunk in product((2, 13), (None, 4)):
        batch = random_tokens(2, prompt), torch.ones(2, prompt, dtype=torch.long)
        check_generation(model, batch, prefill_chunk_size=chunk)
    check_steps(model, dynamic, static, lambda _: DynamicCache())


def test_the_cache_holds_what_each_layer_needs_and_no_more() -> None:
    model = pico_puzzle("none+w16", "kv1+none", "linear+linear", "kv2+w48", "none+none")
    cache = model(random_tokens(2, 5)).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 5, 12), (2, 2, 5, 12)]


BOUNDED = ("kv2win4+w48", "none+w16", "kv1win3s2+none", "kv4+w48", "kv4win4s1+w16")


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(11,), (6, 5), (1,) * 11])
def test_a_window_bounds_its_cache(chunks: tuple[int, ...]) -> None:
    """Whatever way the text went in; and the length goes on being counted."""
    model = pico_puzzle(*BOUNDED)
    cache = DynamicCache(config=model.config)
    for part in random_tokens(2, 11).split(chunks, dim=1):
        model(part, past_key_values=cache, use_cache=True)
    lengths = [3, 4, 11, 4]  # the window's, less the next token's place; the sinks'
    heads = [2, 1, 4, 4]
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [
        (2, count, length, 12) for count, length in zip(heads, lengths, strict=True)
    ]
    assert all(layer.get_seq_length() == 11 for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (12, 4), (2, 1)])
def test_a_token_sees_its_window_and_the_sinks_alone(implementation: str, window: int, sinks: int) -> None:
    """Of a layer: other tokens can be replaced, and its output stays; those in sight cannot."""
    model = pico_puzzle(f"kv2win{window}s{sinks}+none" if sinks else f"kv2win{window}+none")
    model.set_attn_implementation(implementation)
    hidden_BTD = torch.randn(1, 10, 32)
    layer = model.model.layers[0]

    def output(hidden_BTD: Tensor) -> Tensor:
        return layer.subblock_output("attention", hidden_BTD, **model.model.context(hidden_BTD))[0]

    expected_TD = output(hidden_BTD)
    for token in range(10):
        changed_BTD = hidden_BTD.clone()
        changed_BTD[0, token] += 1.0
        differs = (output(changed_BTD) != expected_TD).any(-1).tolist()
        assert differs == [token <= i and (i - token < window or token < sinks) for i in range(10)]


@torch.no_grad()
def test_a_window_longer_than_the_text_changes_nothing() -> None:
    full = pico_puzzle("kv2+w48", "kv4+w48")
    for name in ("win20", "win8s4"):
        model = pico_puzzle(f"kv2{name}+w48", "kv4+w48")
        model.load_state_dict(full.state_dict())
        assert torch.equal(model(random_tokens(2, 12)).logits, full(random_tokens(2, 12)).logits)
        text = generate(model, random_tokens(2, 6), torch.ones(2, 6))[0]
        assert torch.equal(text, generate(full, random_tokens(2, 6), torch.ones(2, 6))[0])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(12,), (4, 4, 4), (6, 1, 5)])
def test_padding_after_the_first_token_of_sinks(chunks: tuple[int, ...]) -> None:
    """On the right, and between: what is left out is left out wherever the cache holds it."""
    model = pico_puzzle("kv2win4s2+w48", "kv4+w48")
    tokens_BT = random_tokens(2, 12)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, 7], mask_BT[1, 9:] = 0, 0
    expected_BTV = model(tokens_BT, attention_mask=mask_BT, use_cache=False).logits
    close(expected_BTV[1:, :9], model(tokens_BT[1:, :9]).logits)
    cache, steps = DynamicCache(config=model.config), []
    for part in tokens_BT.split(chunks, dim=1):
        seen = cache.get_seq_length() + part.shape[1]
        steps.append(model(part, attention_mask=mask_BT[:, :seen], past_key_values=cache).logits)
    close(torch.cat(steps, dim=1), expected_BTV)


def test_padding_on_the_left_of_sinks_is_refused() -> None:
    model = pico_puzzle("kv4+w48", "kv2win3s2+w48")
    with pytest.raises(ValueError, match="attention_mask: padding on the left"):
        generate(model, *padded())
    generate(model, padded()[0], torch.ones(2, 7))


def test_sinks_need_an_implementation_that_takes_masks() -> None:
    """Others, such as an engine's own, would attend to everything, silently."""
    model = pico_puzzle("kv2win3s2+w48")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' knows no attention sinks"):
        model(random_tokens(1, 5))


def test_beams_and_a_cache_used_again() -> None:
    """A cache with sinks is reordered and emptied like any other."""
    model = pico_puzzle("kv2win3s2+w48", "kv4+w48")
    tokens_BT = random_tokens(2, 6)
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens_BT, **beams), model.generate(tokens_BT, use_cache=False, **beams))
    with torch.no_grad():
        cache = model(tokens_BT).past_key_values
        cache.reset()
        again_BTV = model(tokens_BT, past_key_values=cache).logits
        assert torch.equal(again_BTV, model(tokens_BT).logits)
