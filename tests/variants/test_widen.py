"""`widen` writes the weights of a small variant as those of a larger one, which then computes the same."""

import pytest
import torch
from tests.variants.conftest import activation_moments, moments, pico_parent, spread_activations, subblock

from puzzle.variants import Variant
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.linear import LinearAttention, LinearFFN, LowRankFFN
from puzzle.variants.kinds.none import NoAttention, NoFFN

PAIRS = [
    *((GroupedQuery(small), GroupedQuery(large)) for small, large in [(1, 1), (1, 2), (1, 4), (2, 4)]),
    *((GatedFFN(small), GatedFFN(large)) for small, large in [(5, 5), (5, 16), (16, 48)]),
    *((LowRankFFN(small), LowRankFFN(large)) for small, large in [(3, 3), (3, 7)]),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("narrow", "wide"), PAIRS, ids=str)
def test_the_larger_one_computes_the_same(narrow: Variant, wide: Variant, bias: bool) -> None:
    model = pico_parent(attention_bias=bias, mlp_bias=bias)
    statistics = activation_moments(spread_activations(48)) | moments(*torch.randn(2, 90, 32, dtype=torch.float64))
    start = narrow.initialise(subblock(model, narrow.subblock, statistics))
    before = {name: tensor.clone() for name, tensor in start.items()}
    widened = narrow.widen(start, wide, model.config)
    assert widened is not None
    hidden_BTD = torch.randn(2, 5, 32, dtype=torch.float64)
    context = model.model.context(hidden_BTD)
    expected_BTD = narrow.build(model.config, start)(hidden_BTD, **context)
    torch.testing.assert_close(wide.build(model.config, widened)(hidden_BTD, **context), expected_BTD)
    assert all(torch.equal(start[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (GroupedQuery(4), GroupedQuery(2)),
        (GroupedQuery(2), GroupedQuery(3)),
        (GroupedQuery(2), NoAttention()),
        (LinearAttention(), GroupedQuery(4)),
        (NoAttention(), GroupedQuery(4)),
        (GatedFFN(16), GatedFFN(8)),
        (GatedFFN(16), LinearFFN()),
        (LinearFFN(), GatedFFN(16)),
        (LowRankFFN(7), LowRankFFN(3)),
        (LowRankFFN(7), GatedFFN(16)),
        (NoFFN(), GatedFFN(16)),
    ],
    ids=str,
)
def test_where_there_is_no_such_form(narrow: Variant, wide: Variant) -> None:
    model = pico_parent()
    assert narrow.widen({}, wide, model.config) is None
