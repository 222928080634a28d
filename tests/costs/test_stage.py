"""The stage: a complete table, nothing measured twice, and what a person is told."""

import json
from pathlib import Path

import pytest
from tests.costs.conftest import FakeEngine, planted_ms

from puzzle.artefacts import CostTable, Scenario
from puzzle.blocks import BlockVariant, Space
from puzzle.costs import ENGINES, Sample, measure_costs
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.runs import Run

ROUNDS, BATCHES = 3, 2
STACKS = 2 + 4 + 4  # pads, empty layers; kv4 kv2 kv1 linear; w48 w24 w16 linear


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


class BusyEngine(FakeEngine):
    """Every later measurement is slower than those before it."""

    def measure(self, *args: object) -> Sample:
        sample = super().measure(*args)  # type: ignore[arg-type]
        return Sample(prefill_ms=sample.prefill_ms * (1 + len(self.calls) / 30), decode_ms=sample.decode_ms)


def test_a_busy_machine_is_reported(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, space)
    assert "warning" not in log(run)
    busy = BusyEngine()
    busy.environment = {"engine": "fake 1", "device": "busy abacus", "threads": "1"}
    use(busy)
    measure_costs(run, parent, space)
    assert "warning: costs: prefill times at batch 2 scatter by" in log(run)


def journal(run: Run) -> Path:
    return next(run.path.glob("stages/costs-*/measurements.jsonl"))


def log(run: Run) -> str:
    file = run.path / "log.txt"
    return file.read_text() if file.exists() else ""
