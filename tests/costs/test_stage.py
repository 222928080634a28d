"""The stage: a complete table, nothing measured twice, and what a person is told."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.costs.conftest import FakeEngine, opened, planted_ms

from puzzle.artefacts import CostTable, Scenario
from puzzle.costs import ENGINES, Sample, measure_costs
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.variants import BlockVariant, Space, derive_space

ROUNDS, BATCHES = 3, 2
STACKS = 4 + 4 + 4  # pads, empty layers, whole blocks, no last ffn; kv4 kv2 kv1 linear; w48 w24 w16 linear


class Use:
    """Lets the stage measure with a given engine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __call__(self, engine: FakeEngine) -> FakeEngine:
        def make(config: PuzzleConfig, scenario: Scenario) -> FakeEngine:
            return engine

        self._patch.setitem(ENGINES, "torch", make)
        return engine


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    return Use(monkeypatch)


def test_table_is_complete_and_predicts_any_architecture(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    table = measure_costs(run, parent, space)

    assert len(table.rows) == BATCHES * (1 + len(space.layers) * (5 + 4 + 1))
    assert table.environment == {"engine": "fake 1", "device": "abacus", "threads": "1"}
    blocks = ["none+w24", "kv1+none", "linear+linear", "kv4+w48"]
    for batch_size in (2, 3):
        stack = tuple(map(BlockVariant.parse, blocks))
        expected_ms = FakeEngine().measure(stack, batch_size).prefill_ms
        assert table.totals(blocks, batch_size).cost.prefill_ms == pytest.approx(expected_ms)
    parents_own = table.totals([layer.parent.name for layer in space.layers], 2)
    assert parents_own.cost.params == parent.num_params
    assert parents_own.cost.weight_bytes == 4 * parent.num_params


def test_table_survives_json(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    table = measure_costs(run, parent, space)
    assert CostTable.from_json(table.to_json()) == table


def test_a_finished_stage_is_read_back(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    table = measure_costs(run, parent, space)
    assert measure_costs(run, parent, space) == table
    journal(run).unlink()
    second = use(FakeEngine())
    assert measure_costs(run, parent, space) == table
    assert second.calls == []


def test_rounds_are_interleaved(run: Run, parent: Parent, space: Space, use: Use) -> None:
    engine = use(FakeEngine())
    measure_costs(run, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS * STACKS
    first_batch = engine.calls[: ROUNDS * STACKS]
    assert len(set(first_batch)) == STACKS
    assert first_batch == first_batch[:STACKS] * ROUNDS


@pytest.mark.parametrize("torn", ["", '{"stack": "pads", "batch'])
def test_a_restart_repeats_nothing(run: Run, parent: Parent, space: Space, use: Use, torn: str) -> None:
    first = use(FakeEngine(fail_after=17))
    with pytest.raises(KeyboardInterrupt):
        measure_costs(run, parent, space)
    with journal(run).open("a") as file:
        file.write(torn)

    second = use(FakeEngine())
    table = measure_costs(run, parent, space)
    assert len(first.calls) == 17
    assert len(second.calls) == BATCHES * ROUNDS * STACKS - 17
    kept = [json.loads(line) for line in journal(run).read_text().splitlines()]
    assert len({(row["stack"], row["batch_size"], row["round"]) for row in kept}) == BATCHES * ROUNDS * STACKS
    assert table.block(2, "kv2+w24", 3).prefill_ms == pytest.approx(planted_ms("kv2", 3) + planted_ms("w24", 3))


def test_another_machine_measures_for_itself(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, space)
    other = FakeEngine()
    other.environment = {"engine": "fake 1", "device": "slide rule", "threads": "1"}
    use(other)
    assert measure_costs(run, parent, space).environment["device"] == "slide rule"
    assert len(other.calls) == BATCHES * ROUNDS * STACKS


class SlowedEngine(FakeEngine):
    """Slower by a factor that depends on how many measurements there were."""

    def __init__(self, factor: Callable[[int], float] = lambda calls: 1.04**calls) -> None:
        super().__init__()
        self.factor = factor

    def measure(self, *args: object) -> Sample:
        factor = self.factor(len(self.calls))
        sample = super().measure(*args)  # type: ignore[arg-type]
        return Sample(prefill_ms=sample.prefill_ms * factor, decode_ms=sample.decode_ms * factor)


def test_a_busy_machine_is_reported(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, space)
    assert "warning" not in log(run)
    busy = SlowedEngine()
    busy.environment = {"engine": "fake 1", "device": "busy abacus", "threads": "1"}
    use(busy)
    measure_costs(run, parent, space)
    assert "warning: costs: prefill times at batch 2 scatter by" in log(run)
    assert len(busy.calls) == 2 * BATCHES * ROUNDS * STACKS


def test_noise_that_goes_by_is_outvoted(run: Run, parent: Parent, space: Space, use: Use) -> None:
    slow_round = range(STACKS, 2 * STACKS)
    engine = use(SlowedEngine(lambda calls: 1.5 if calls in slow_round else 1.0))
    table = measure_costs(run, parent, space)
    assert len(engine.calls) == 3 * ROUNDS * STACKS  # twice as many at the first batch size alone
    assert "warning" not in log(run)
    assert table.block(2, "kv2+w24", 2).prefill_ms == pytest.approx(planted_ms("kv2", 2) + planted_ms("w24", 2))


@pytest.fixture
def later(run: Run, pico_checkpoint: Path, tmp_path: Path) -> Iterator[Run]:
    """Another run on the same machine."""
    with opened(pico_checkpoint, tmp_path / "later") as opened_later:
        yield opened_later


def test_a_later_run_measures_the_pads_alone(run: Run, later: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    first = measure_costs(run, parent, space)
    engine = use(FakeEngine())
    assert measure_costs(later, parent, space) == first
    assert len(engine.calls) == BATCHES * ROUNDS
    assert f"costs: {STACKS - 1} of {STACKS} measurements at batch 2 are those of an earlier run" in log(later)


def test_a_later_run_measures_what_is_new(run: Run, later: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, derive_space(parent.config, ffn_widths=[24]))
    engine = use(FakeEngine())
    table = measure_costs(later, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS * 2  # pads and w16
    assert table.block(2, "kv2+w16", 3).prefill_ms == pytest.approx(planted_ms("kv2", 3) + planted_ms("w16", 3))


@pytest.mark.parametrize("changed", ["speed", "noise", "version"])
def test_what_may_be_wrong_is_not_used(
    run: Run, later: Run, parent: Parent, space: Space, use: Use, changed: str
) -> None:
    use(SlowedEngine() if changed == "noise" else FakeEngine())
    measure_costs(run, parent, space)
    engine = SlowedEngine(lambda _: 1.1) if changed == "speed" else FakeEngine()
    if changed == "version":
        engine.environment = {**engine.environment, "engine": "fake 2"}
    use(engine)
    measure_costs(later, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS * STACKS


def journal(run: Run) -> Path:
    return next(run.path.glob("stages/cost-*/measurements.jsonl"))


def log(run: Run) -> str:
    file = run.path / "log.txt"
    return file.read_text() if file.exists() else ""
