"""The stage: a complete table, nothing measured twice, and what a person is told."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.costs.conftest import FakeEngine, opened, planted_ms

from puzzle.artefacts import CostTable
from puzzle.costs import Sample, is_measured, measure_costs
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.variants import Architecture, BlockVariant, Space, derive_space

Use = Callable[[FakeEngine], FakeEngine]
Patch = pytest.MonkeyPatch
ROUNDS, BATCHES = 3, 2
STACKS = 4 + 4 + 4  # pads, empty layers, whole blocks, no last ffn; kv4 kv2 kv1 linear; w48 w24 w16 linear


@pytest.fixture
def later(run: Run, pico_checkpoint: Path, tmp_path: Path) -> Iterator[Run]:
    """Another run on the same machine."""
    with opened(pico_checkpoint, tmp_path / "later") as opened_later:
        yield opened_later


def test_table_is_complete_and_predicts_any_architecture(run: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    table = measure_costs(run, parent, space)
    assert len(table.rows) == BATCHES * (1 + len(space.layers) * (5 + 4 + 1))
    assert table.environment == FakeEngine.environment
    blocks = ["none+w24", "kv1+none", "linear+linear", "kv4+w48"]
    for batch_size in (2, 3):
        expected = FakeEngine().times(Architecture.parse(blocks).blocks, batch_size)
        predicted = table.totals(blocks, batch_size).cost
        assert (predicted.prefill_ms, predicted.decode_ms) == pytest.approx((expected.prefill_ms, expected.decode_ms))
    of_parent = table.totals(parent.architecture.names, 2).cost
    assert (of_parent.params, of_parent.weight_bytes) == (parent.num_params, 4 * parent.num_params)
    assert CostTable.from_json(table.to_json()) == table
    second = use(FakeEngine())
    assert measure_costs(run, parent, space) == table
    assert second.calls == []


class SlowStart(FakeEngine):
    slow_start = True


def test_stacks_take_turns_but_for_an_engine_that_is_slow_to_start(
    run: Run, later: Run, parent: Parent, space: Space, use: Use
) -> None:
    engine = use(FakeEngine())
    measure_costs(run, parent, space)
    one_round = engine.calls[: STACKS * BATCHES]
    assert len(set(one_round)) == STACKS * BATCHES
    assert engine.calls == one_round * ROUNDS
    slow = use(SlowStart())
    slow.environment = {"engine": "slow"}
    measure_costs(later, parent, space)
    assert slow.calls == [call for call in one_round for _ in range(ROUNDS)]


def test_a_restart_repeats_the_pads_alone(run: Run, parent: Parent, space: Space, use: Use) -> None:
    first = use(FakeEngine(fail_after=17 * BATCHES))  # in the second round
    with pytest.raises(KeyboardInterrupt):
        measure_costs(run, parent, space)
    second = use(FakeEngine())
    table = measure_costs(run, parent, space)
    pads = first.calls[0][0]
    kept = sum(stack != pads for stack, _ in first.calls)
    assert len(second.calls) == BATCHES * ROUNDS * STACKS - kept
    assert sum(stack == pads for stack, _ in second.calls) == BATCHES * ROUNDS
    assert table.block(2, "kv2+w24", 3).prefill_ms == pytest.approx(planted_ms("kv2", 3) + planted_ms("w24", 3))


def test_what_scatters_is_measured_more_often_and_reported(run: Run, parent: Parent, space: Space, use: Use) -> None:
    busy = use(FakeEngine(lambda call: 1.5 if call * 7919 % 1009 < 500 else 1.0))
    measure_costs(run, parent, space)
    assert len(busy.calls) == 4 * BATCHES * ROUNDS * STACKS
    assert "warning: costs: times scatter, the typical stack's is known to" in log(run)


def test_a_model_without_layers_that_is_lost_in_noise_is_said(run: Run, parent: Parent, space: Space, use: Use) -> None:
    class Quick(FakeEngine):
        """Two blocks take less than six of them promise."""

        def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
            sample = super().times(stack, batch_size)
            return sample if len(stack) > 2 else Sample(0.5 * sample.prefill_ms, 0.5 * sample.decode_ms)

    use(Quick())
    table = measure_costs(run, parent, space)
    assert min(table.fixed(size).decode_ms for size in (2, 3)) > 0
    assert "costs: at batch 2 a decode step without layers is lost in noise and taken as the head's share" in log(run)


def test_what_slows_a_whole_round_is_no_cost(run: Run, parent: Parent, space: Space, use: Use) -> None:
    """The first of three rounds is the fastest: the second quickest would be half as slow again."""
    engine = use(FakeEngine(lambda call: 1.0 + call // (STACKS * BATCHES)))
    table = measure_costs(run, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS * STACKS
    assert "warning" not in log(run)
    expected = planted_ms("kv2", 2) + planted_ms("w24", 2)
    assert table.block(2, "kv2+w24", 2).prefill_ms == pytest.approx(1.5 * expected)  # the lower quartile of 1, 2, 3
    assert table.block(0, "kv2+w24", 2).decode_ms == pytest.approx(1.5 * expected / 10)


def test_a_later_run_measures_the_pads_alone(run: Run, later: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, space)
    engine = use(FakeEngine(lambda call: 1.02))
    measure_costs(later, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS
    said = rf"batch 2: of {STACKS - 1} stacks {STACKS - 1} are in .*; the pads take \+2.0% now; using {STACKS - 1}, "
    assert re.search(said, log(later))


def test_a_later_run_measures_what_is_new(run: Run, later: Run, parent: Parent, space: Space, use: Use) -> None:
    use(FakeEngine())
    measure_costs(run, parent, derive_space(parent.config, ffn_widths=[24]))
    engine = use(FakeEngine())
    table = measure_costs(later, parent, space)
    assert len(engine.calls) == BATCHES * ROUNDS * 2  # pads and w16
    assert table.block(2, "kv2+w16", 3).prefill_ms == pytest.approx(planted_ms("kv2", 3) + planted_ms("w16", 3))


@pytest.mark.parametrize("changed", [None, {"engine": "fake 2"}, {"device": "slide rule"}])
def test_what_is_off_by_now_or_of_another_machine_is_measured_anew(
    run: Run, later: Run, parent: Parent, space: Space, use: Use, changed: dict[str, str] | None
) -> None:
    use(FakeEngine())
    measure_costs(run, parent, space)
    engine = use(FakeEngine(lambda call: 1.0 if changed else 1.1))
    engine.environment = FakeEngine.environment | (changed or {})
    assert measure_costs(later, parent, space).environment == engine.environment
    assert len(engine.calls) == BATCHES * ROUNDS * STACKS
    assert ("the pads take +10.0% now; using 0" in log(later)) == (changed is None)


@pytest.mark.parametrize("why", ["asked", "home cannot be written"])
def test_measurements_stay_in_the_run_folder(
    why: str, pico_checkpoint: Path, parent: Parent, space: Space, use: Use, tmp_path: Path, monkeypatch: Patch
) -> None:
    home = tmp_path / "file"
    home.touch()  # no folder can be made in it, even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path if why == "asked" else home))
    use(FakeEngine())
    with opened(pico_checkpoint, tmp_path / "run", reuse=why != "asked") as run:
        measure_costs(run, parent, space)
        assert len(list(run.path.glob("stages/cost-*/measurements/*.json"))) == BATCHES * (STACKS - 1)
    assert not (tmp_path / "puzzle").exists()


def test_a_table_stands_wherever_it_is_read_unless_it_is_asked_for_anew(
    run: Run, parent: Parent, space: Space, use: Use
) -> None:
    use(FakeEngine())
    assert not is_measured(run, parent, space)
    table = measure_costs(run, parent, space)
    engine = use(FakeEngine(lambda call: 2.0))
    engine.environment = FakeEngine.environment | {"engine": "fake 2", "threads": "8"}
    assert measure_costs(run, parent, space) == table
    assert is_measured(run, parent, space)
    assert engine.calls == []
    assert "costs: as measured with engine fake 1, threads 1; here are engine fake 2, threads 8; --rem" in log(run)
    again = replace(run, remeasure=True, used=[])
    assert not is_measured(again, parent, space)
    anew = measure_costs(again, parent, space)
    assert anew.environment == engine.environment
    assert len(engine.calls) == BATCHES * ROUNDS * STACKS
    assert anew.block(2, "kv2+w24", 3).prefill_ms == pytest.approx(2 * table.block(2, "kv2+w24", 3).prefill_ms)
    assert measure_costs(again, parent, space) == measure_costs(run, parent, space) == anew


def log(run: Run) -> str:
    file = run.path / "log.txt"
    return file.read_text() if file.exists() else ""
