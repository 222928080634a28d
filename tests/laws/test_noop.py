"""Law 2: `none` in both subblocks makes a layer the identity on the residual stream."""

import torch
from tests.conftest import pico_puzzle, random_tokens

KEPT = ("kv4+w48", "kv2win4s1+linear", "linear+w16", "kv2win3+w48")


def test_the_layer_returns_its_input() -> None:
    model = pico_puzzle("kv4+w48", "none+none")
    hidden_BTD = torch.randn(2, 5, 32)
    layer = model.model.layers[1]
    assert layer(hidden_BTD, **model.model.context(hidden_BTD)) is hidden_BTD
    assert not list(layer.parameters())


def test_one_subblock_left_out_leaves_the_other() -> None:
    model = pico_puzzle("kv4+w48", "kv4+none", "none+w48")
    hidden_BTD = torch.randn(2, 5, 32)
    context = model.model.context(hidden_BTD)
    whole, attention, ffn = model.model.layers
    attention.load_state_dict(whole.state_dict(), strict=False)
    ffn.load_state_dict(whole.state_dict(), strict=False)
    assert torch.equal(ffn(attention(hidden_BTD, **context), **context), whole(hidden_BTD, **context))


@torch.no_grad()
def test_leaving_such_layers_out_changes_nothing() -> None:
    """Also first and last, where caches and norms are numbered from."""
    small = pico_puzzle(*KEPT)
    large = pico_puzzle("none+none", KEPT[0], "none+none", *KEPT[1:], "none+none")
    kept = [layer for layer in large.model.layers if layer.norm_names]
    for source, target in zip(small.model.layers, kept, strict=True):
        target.load_state_dict(source.state_dict())
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    tokens_BT = random_tokens(2, 9)
    assert torch.equal(large(tokens_BT).logits, small(tokens_BT).logits)
    texts = [model.generate(tokens_BT, do_sample=False, max_new_tokens=4, pad_token_id=0) for model in (small, large)]
    assert torch.equal(*texts)
