"""The slope between stacks recovers what an additive engine was given."""

from collections.abc import Sequence

import pytest
from tests.costs.conftest import EMPTY_LAYER_MS, FIXED_MS, FakeEngine, planted_ms

from puzzle.artefacts import Scenario
from puzzle.costs import Sample
from puzzle.costs.slopes import FIXED, Plan
from puzzle.costs.table import cost_rows, part_times
from puzzle.parents import Parent
from puzzle.variants import Architecture, BlockVariant, LayerSpace, Space


def part_times_on(plan: Plan, engine: FakeEngine, batch_size: int = 1) -> dict[tuple[str, str], Sample]:
    return part_times(plan, {name: [engine.times(stack, batch_size)] for name, stack in plan.stacks.items()})


def test_planted_costs_are_recovered_exactly(parent: Parent, space: Space) -> None:
    times = part_times_on(Plan.of(space, parent.config), FakeEngine())
    for variant in (*space.layers[0].attention, *space.layers[0].ffn):
        part = times[variant.subblock, variant.name]
        assert part.prefill_ms == pytest.approx(planted_ms(variant.name, 1), abs=1e-9)
        assert part.decode_ms == pytest.approx(planted_ms(variant.name, 1) / 10, abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)


class Rows(FakeEngine):
    """Fills in an FFN of half a millisecond where attention has none, as llama.cpp does."""

    def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().times(stack, batch_size)
        added_ms = 0.5 * sum(block.ffn.absent and not block.attention.absent for block in stack)
        return Sample(prefill_ms=sample.prefill_ms + added_ms, decode_ms=sample.decode_ms)


def test_what_is_filled_in_for_a_missing_ffn_is_no_cost_of_attention(parent: Parent, space: Space) -> None:
    times = part_times_on(Plan.of(space, parent.config), Rows())
    for variant in space.layers[0].attention:
        assert times["attention", variant.name].prefill_ms == pytest.approx(planted_ms(variant.name, 1), abs=1e-9)
    assert times[FIXED].prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)


class LastToken(FakeEngine):
    """Skips three quarters of the last layer's FFN in a prefill."""

    def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().times(stack, batch_size)
        skipped_ms = 0.75 * planted_ms(stack[-1].ffn.name, batch_size)
        return Sample(prefill_ms=sample.prefill_ms - skipped_ms, decode_ms=sample.decode_ms)


def test_the_last_ffn_may_cost_less(parent: Parent, space: Space) -> None:
    times = part_times_on(Plan.of(space, parent.config), LastToken())
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
    small, large = Architecture.parse(["none+w16", "kv4+w48"]).blocks
    layers = tuple(LayerSpace((block.attention,), (block.ffn,)) for block in (small, large, large))
    plan = Plan.of(Space(layers), parent.config)

    assert plan.pad == large
    assert len(plan.stacks) == 4 + 3  # pads, empty layers, whole blocks, no last ffn; w16, kv4, w48
    times = part_times_on(plan, FakeEngine())
    parts = [(variant.subblock, variant.name) for block in (small, large, large) for variant in block.subblocks]
    predicted_ms = times[FIXED].prefill_ms + sum(times[part].prefill_ms for part in parts)
    assert predicted_ms == pytest.approx(FakeEngine().times((small, large, large), 1).prefill_ms)


def test_noise_makes_no_cost_negative(parent: Parent, space: Space) -> None:
    plan = Plan.of(space, parent.config)
    samples = {name: [FakeEngine().times(stack, 1)] for name, stack in plan.stacks.items()}
    samples["ffn linear"] = [Sample(prefill_ms=0.5, decode_ms=0.5)]
    samples["pads"] = [Sample(prefill_ms=1.0, decode_ms=1.0)]
    times = part_times(plan, samples)
    assert times["ffn", "linear"].prefill_ms == 0.0
    assert times[FIXED].prefill_ms == times[FIXED].decode_ms == 0.0
