"""A table fitted to whole models predicts what they took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.search.timing import TIMES, Timed, fitted

SCENARIO = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=4, generated_tokens=2)


def table() -> CostTable:
    """Two layers; an FFN takes 6 or 2 ms of prefill and a tenth of that of a step, fixed are 4 ms; twice at batch 2."""
    row = CostRow(
        layer=-1, part="fixed", variant="", batch_size=1, params=1, weight_bytes=4, kv_bytes_per_sequence=0,
        prefill_ms=4.0, decode_ms=0.4,
    )  # fmt: skip
    subblocks = [
        replace(row, layer=layer, part=part, variant=name, prefill_ms=ms, decode_ms=ms / 10)
        for layer in range(2)
        for part, name, ms in (("attention", "none", 0.0), ("ffn", "w8", 6.0), ("ffn", "w4", 2.0))
    ]
    rows = [row, *subblocks]
    double = [replace(r, batch_size=2, prefill_ms=2 * r.prefill_ms, decode_ms=2 * r.decode_ms) for r in rows]
    return CostTable(scenario=SCENARIO, batch_sizes=(1, 2), rows=(*rows, *double))


def times(costs: CostTable, blocks: tuple[str, str], batch_size: int = 1) -> tuple[float, float]:
    cost = costs.totals(blocks, batch_size).cost
    return cost.prefill_ms, cost.decode_ms


def timed(*models: tuple[tuple[float, float], tuple[float, float]]) -> list[Timed]:
    """From predicted and measured prefill and step of each model."""
    return [
        Timed(model="child", quantity=name, predicted=one, measured=other)
        for predicted, measured in models
        for name, one, other in zip(TIMES, predicted, measured, strict=True)
    ]


LARGE, MIXED, SMALL = ("none+w8", "none+w8"), ("none+w8", "none+w4"), ("none+w4", "none+w4")


@given(scale=st.floats(0.5, 2.0), offset=st.floats(0.0, 3.0))
def test_a_scale_and_an_offset_are_found(scale: float, offset: float) -> None:
    models = []
    for blocks in (LARGE, MIXED, SMALL):
        prefill, decode = times(table(), blocks)
        models.append(((prefill, decode), (scale * prefill + offset, decode)))
    after = fitted(table(), 1, timed(*models))
    for blocks, (_, measured) in zip((LARGE, MIXED, SMALL), models, strict=True):
        assert times(after, blocks) == pytest.approx(measured)
    assert times(after, LARGE, 2) == times(table(), LARGE, 2)
    assert after.totals(LARGE, 1).cost.params == table().totals(LARGE, 1).cost.params


def test_models_of_one_size_give_a_scale_alone() -> None:
    models = timed(((16.0, 1.6), (8.0, 3.2)), ((16.0, 1.6), (8.0, 3.2)))
    assert times(fitted(table(), 1, models), SMALL) == pytest.approx((4.0, 1.6))


def test_a_slope_that_is_against_the_order_is_not_believed() -> None:
    models = timed(((16.0, 1.6), (8.0, 1.6)), ((8.0, 0.8), (16.0, 0.8)))
    fixed = fitted(table(), 1, models).fixed(1)
    assert fixed.prefill_ms > 0
    assert fixed.decode_ms == pytest.approx(0.4)


def test_what_is_fixed_does_not_fall_below_zero() -> None:
    after = fitted(table(), 1, timed(((16.0, 1.6), (16.0, 1.6)), ((8.0, 0.8), (4.0, 0.8))))
    assert after.fixed(1).prefill_ms > 0
    errors = [times(after, blocks)[0] / measured - 1 for blocks, measured in ((LARGE, 16.0), (SMALL, 4.0))]
    assert min(errors) < 0 < max(errors)
