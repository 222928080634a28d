"""The guard lets usual steps through and nothing that is not finite or far above them."""

import math

import pytest

from puzzle.distill.spikes import SpikeGuard


def _seen(steps: int) -> SpikeGuard:
    guard = SpikeGuard()
    for step in range(steps):
        assert guard.admits(1.0 + 0.3 * math.sin(step), 0.5 + 0.4 * math.cos(step))
    return guard


@pytest.mark.parametrize("spike", [(math.nan, 1.0), (1.0, math.inf), (4.0, 0.5), (1.0, 6.0)])
def test_spikes_are_skipped_and_counted(spike: tuple[float, float]) -> None:
    guard = _seen(100)
    assert [guard.admits(*spike) for _ in range(3)] == [False] * 3
    assert guard.skips == 3
    assert guard.admits(1.0, 0.5)
    assert guard.skips == 0


def test_what_is_usual_follows_the_training() -> None:
    guard, loss = _seen(20), 1.0
    for _ in range(400):
        loss *= 1.01
        assert guard.admits(loss, 0.5)
    assert not guard.admits(1.0, math.nan)


def test_before_there_is_a_median_only_what_is_not_finite_is_skipped() -> None:
    guard = _seen(15)
    assert not guard.admits(math.inf, 1.0)
    assert guard.admits(1e6, 1e6)


def test_a_new_phase_starts_without_a_past() -> None:
    guard = _seen(30)
    assert not guard.admits(100.0, 1.0)
    guard.clear()
    assert guard.admits(100.0, 1.0)
    assert guard.skips == 0


def test_memory_is_all_that_a_resumed_guard_needs() -> None:
    guard, resumed = _seen(30), SpikeGuard()
    guard.admits(math.nan, 1.0)
    resumed.memory.copy_(guard.memory)
    assert resumed.skips == 1
    assert not resumed.admits(100.0, 1.0)
