"""A table fitted to whole models predicts what they took."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.search.fit import Timed, fitted

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


LARGE, MIXED, SMALL = ("none+w8", "none+w8"), ("none+w8", "none+w4"), ("none+w4", "none+w4")


@given(scale=st.floats(0.5, 2.0), offset=st.floats(0.0, 3.0))
def test_a_scale_and_an_offset_are_found(scale: float, offset: float) -> None:
    models = []
    for blocks in (LARGE, MIXED, SMALL):
        prefill, decode = times(table(), blocks)
        models.append(Timed(predicted=(prefill, decode), measured=(scale * prefill + offset, decode)))
    after = fitted(table(), 1, models)
    for blocks, model in zip((LARGE, MIXED, SMALL), models, strict=True):
        assert times(after, blocks) == pytest.approx(model.measured)
    assert times(after, LARGE, 2) == times(table(), LARGE, 2)
    assert after.totals(LARGE, 1).cost.params == table().totals(LARGE, 1).cost.params


def test_models_of_one_size_give_a_scale_alone() -> None:
    models = [Timed(predicted=(16.0, 1.6), measured=(8.0, 3.2)), Timed(predicted=(16.0, 1.6), measured=(8.0, 3.2))]
    assert times(fitted(table(), 1, models), SMALL) == pytest.approx((4.0, 1.6))


def test_a_slope_that_is_against_the_order_is_not_believed() -> None:
    models = [Timed(predicted=(16.0, 1.6), measured=(8.0, 1.6)), Timed(predicted=(8.0, 0.8), measured=(16.0, 0.8))]
    fixed = fitted(table(), 1, models).fixed(1)
    assert fixed.prefill_ms > 0
    assert fixed.decode_ms == pytest.approx(0.4)


def test_what_is_fixed_does_not_fall_below_zero() -> None:
    models = [Timed(predicted=(16.0, 1.6), measured=(16.0, 1.6)), Timed(predicted=(8.0, 0.8), measured=(4.0, 0.8))]
    after = fitted(table(), 1, models)
    assert after.fixed(1).prefill_ms > 0
    errors = [
        times(after, blocks)[0] / model.measured[0] - 1 for blocks, model in zip((LARGE, SMALL), models, strict=True)
    ]
    assert min(errors) < 0 < max(errors)


def test_a_prediction_agrees_with_what_noise_may_have_made_of_it() -> None:
    model = Timed(predicted=(11.0, 1.0), measured=(10.0, 2.0), uncertainty=(0.05, 0.51))
    assert model.errors == pytest.approx((0.1, 0.5))
    assert model.agrees(0.11)
    assert not model.agrees(0.09)
    assert not replace(model, uncertainty=(0.11, 0.49)).agrees(0.11)
