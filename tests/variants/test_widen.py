"""`widen` writes the weights of a small variant as those of a larger one, which then computes the same."""

import pytest
import torch
from tests.variants.conftest import activation_moments, moments, pico_parent, spread_activations, subblock

from puzzle.variants import Subblock, parse_variant


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("which", "small", "large"),
    [
        *(
            ("attention", *pair)
            for pair in [("kv1", "kv1"), ("kv1", "kv4"), ("kv2", "kv4"), ("kv2win4s1", "kv4win4s1")]
        ),
        *(
            ("ffn", *pair)
            for pair in [("w5", "w5"), ("w5", "w16"), ("w16", "w48"), ("rank3", "rank3"), ("rank3", "rank7")]
        ),
    ],
)
def test_the_larger_one_computes_the_same(which: Subblock, small: str, large: str, bias: bool) -> None:
    model, narrow, wide = pico_parent(bias=bias), parse_variant(which, small), parse_variant(which, large)
    statistics = activation_moments(spread_activations(48)) | moments(*torch.randn(2, 90, 32, dtype=torch.float64))
    start = narrow.initialise(subblock(model, which, statistics))
    before = {name: tensor.clone() for name, tensor in start.items()}
    widened = narrow.widen(start, wide, model.config)
    assert widened is not None
    hidden_BTD = torch.randn(2, 7, 32, dtype=torch.float64)
    context = model.model.context(hidden_BTD)
    expected_BTD = narrow.build(model.config, start)(hidden_BTD, **context)
    torch.testing.assert_close(wide.build(model.config, widened)(hidden_BTD, **context), expected_BTD)
    assert all(torch.equal(start[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("which", "narrow", "wide"),
    [
        *(("attention", "kv2", wide) for wide in ("kv1", "kv3", "none", "linear", "kv4win4")),
        *(("attention", *pair) for pair in [("linear", "kv4"), ("none", "kv4"), ("kv2win4", "kv4win4s1")]),
        *(("ffn", "w16", wide) for wide in ("w8", "linear", "rank7")),
        *(("ffn", *pair) for pair in [("linear", "w16"), ("none", "w16"), ("rank7", "rank3"), ("rank7", "w16")]),
    ],
)
def test_where_there_is_no_such_form(which: Subblock, narrow: str, wide: str) -> None:
    assert parse_variant(which, narrow).widen({}, parse_variant(which, wide), pico_parent().config) is None
