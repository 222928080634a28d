"""The slope between stacks recovers what an additive engine was given."""

import pytest
from tests.costs.conftest import EMPTY_LAYER_MS, FIXED_MS, FakeEngine, planted_ms

from puzzle.blocks import BlockVariant, LayerSpace, Space
from puzzle.costs import Sample
from puzzle.costs.slopes import FIXED, Plan
from puzzle.costs.table import part_times
from puzzle.parents import Parent


def rounds_of(plan: Plan, engine: FakeEngine, repeats: int) -> list[dict[str, Sample]]:
    return [{name: engine.measure(stack, 1) for name, stack in plan.stacks.items()} for _ in range(repeats)]


def test_planted_costs_are_recovered_exactly(parent: Parent, space: Space) -> None:
    times = part_times(Plan.of(space, parent.config), rounds_of(Plan.of(space, parent.config), FakeEngine(), 2))
    for variant in (*space.layers[0].attention, *space.layers[0].ffn):
        part = times[variant.half, variant.name]
        assert part.prefill_ms == pytest.approx(planted_ms(variant.name, 1), abs=1e-9)
        assert part.decode_ms == pytest.approx(planted_ms(variant.name, 1) / 10, abs=1e-9)
        assert part.prefill_ms_spread == pytest.approx(0, abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)


def test_layers_that_differ_share_what_they_have_in_common(parent: Parent) -> None:
    small, large = BlockVariant.parse("none+w16"), BlockVariant.parse("kv4+w48")
    layers = tuple(LayerSpace((block.attention,), (block.ffn,)) for block in (small, large, large))
    plan = Plan.of(Space(layers), parent.config)

    assert plan.pad == large
    assert len(plan.stacks) == 2 + 3  # pads, empty layers; w16, kv4, w48
    times = part_times(plan, rounds_of(plan, FakeEngine(), 1))
    predicted_ms = times[FIXED].prefill_ms + sum(
        times[variant.half, variant.name].prefill_ms
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
