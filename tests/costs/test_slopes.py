"""The slope between stacks recovers what an additive engine was given."""

from collections.abc import Sequence

import pytest
from tests.costs.conftest import EMPTY_LAYER_MS, FIXED_MS, FakeEngine, planted_ms

from puzzle.artefacts import Scenario
from puzzle.costs import Sample
from puzzle.costs.slopes import FIXED, Plan
from puzzle.costs.table import cost_rows, part_times
from puzzle.parents import Parent
from puzzle.variants import BlockVariant, LayerSpace, Space


def rounds_of(plan: Plan, engine: FakeEngine, repeats: int) -> list[dict[str, Sample]]:
    return [{name: engine.measure(stack, 1) for name, stack in plan.stacks.items()} for _ in range(repeats)]


def test_planted_costs_are_recovered_exactly(parent: Parent, space: Space) -> None:
    times = part_times(Plan.of(space, parent.config), rounds_of(Plan.of(space, parent.config), FakeEngine(), 2))
    for variant in (*space.layers[0].attention, *space.layers[0].ffn):
        part = times[variant.subblock, variant.name]
        assert part.prefill_ms == pytest.approx(planted_ms(variant.name, 1), abs=1e-9)
        assert part.decode_ms == pytest.approx(planted_ms(variant.name, 1) / 10, abs=1e-9)
        assert part.prefill_ms_spread == pytest.approx(0, abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)


class Rows(FakeEngine):
    """Puts an FFN of half a millisecond where attention has none."""

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().measure(blocks, batch_size)
        added_ms = 0.5 * sum(block.attention.kind != "none" and block.ffn.kind == "none" for block in blocks)
        return Sample(prefill_ms=sample.prefill_ms + added_ms, decode_ms=sample.decode_ms)


def test_what_stands_in_for_a_missing_half_is_no_cost_of_the_other(parent: Parent, space: Space) -> None:
    plan = Plan.of(space, parent.config)
    times = part_times(plan, rounds_of(plan, Rows(), 1))
    for variant in space.layers[0].attention:
        assert times["attention", variant.name].prefill_ms == pytest.approx(planted_ms(variant.name, 1), abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)


class LastToken(FakeEngine):
    """Skips three quarters of the last layer's FFN in a prefill."""

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().measure(blocks, batch_size)
        skipped_ms = 0.75 * planted_ms(blocks[-1].ffn.name, batch_size)
        return Sample(prefill_ms=sample.prefill_ms - skipped_ms, decode_ms=sample.decode_ms)


def test_the_last_ffn_may_cost_less(parent: Parent, space: Space) -> None:
    plan = Plan.of(space, parent.config)
    times = part_times(plan, rounds_of(plan, LastToken(), 1))
    for variant in space.layers[0].ffn:
        planted = planted_ms(variant.name, 1)
        assert times["ffn", variant.name].prefill_ms == pytest.approx(planted, abs=1e-9)
        assert times["last ffn", variant.name].prefill_ms == pytest.approx(planted / 4, abs=1e-9)
        assert times["last ffn", variant.name].decode_ms == pytest.approx(planted / 10, abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)
    scenario = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=4, generated_tokens=2)
    rows = {(row.layer, row.variant): row for row in cost_rows(parent.config, space, scenario, 1, times)}
    last = len(space.layers) - 1
    assert rows[last, "w48"].prefill_ms == pytest.approx(rows[0, "w48"].prefill_ms / 4)
    assert rows[last, "kv4"].prefill_ms == pytest.approx(rows[0, "kv4"].prefill_ms)


def test_layers_that_differ_share_what_they_have_in_common(parent: Parent) -> None:
    small, large = BlockVariant.parse("none+w16"), BlockVariant.parse("kv4+w48")
    layers = tuple(LayerSpace((block.attention,), (block.ffn,)) for block in (small, large, large))
    plan = Plan.of(Space(layers), parent.config)

    assert plan.pad == large
    assert len(plan.stacks) == 4 + 3  # pads, empty layers, whole blocks, no last ffn; w16, kv4, w48
    times = part_times(plan, rounds_of(plan, FakeEngine(), 1))
    predicted_ms = times[FIXED].prefill_ms + sum(
        times[variant.subblock, variant.name].prefill_ms
        for block in (small, large, large)
        for variant in (block.attention, block.ffn)
    )
    assert predicted_ms == pytest.approx(FakeEngine().measure((small, large, large), 1).prefill_ms)


def test_a_slow_round_shows_in_the_spread_and_not_in_the_cost(parent: Parent, space: Space) -> None:
    plan = Plan.of(space, parent.config)
    rounds = rounds_of(plan, FakeEngine(), 5)
    slow = {
        name: Sample(prefill_ms=9 * sample.prefill_ms, decode_ms=sample.decode_ms) for name, sample in rounds[1].items()
    }
    times = part_times(plan, [rounds[0], slow, slow, rounds[3], rounds[4]])
    part = times["attention", "kv4"]
    assert part.prefill_ms == pytest.approx(planted_ms("kv4", 1))
    assert part.prefill_ms_spread == pytest.approx(8 * planted_ms("kv4", 1) / 2)
    assert part.decode_ms_spread == pytest.approx(0, abs=1e-9)


def test_noise_makes_no_cost_negative(parent: Parent, space: Space) -> None:
    plan = Plan.of(space, parent.config)
    samples = rounds_of(plan, FakeEngine(), 1)[0]
    samples["ffn linear"] = Sample(prefill_ms=0.0, decode_ms=0.0)
    samples["pads"] = Sample(prefill_ms=1.0, decode_ms=1.0)
    times = part_times(plan, [samples])
    assert times["ffn", "linear"].prefill_ms == 0.0
    assert times[FIXED].prefill_ms == times[FIXED].decode_ms == 0.0
