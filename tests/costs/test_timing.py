"""Whole models in turns: as many rounds as the decision needs, and the statistics of repeated times."""

import random
import statistics
from collections.abc import Callable

import pytest
from tests.costs.conftest import FakeEngine

from puzzle.artefacts import Scenario
from puzzle.costs import Sample, relative_standard_error, summarise, time_models
from puzzle.costs.timing import ratio_standard_error
from puzzle.parents import Parent
from puzzle.variants import Architecture

SCENARIO = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=6, generated_tokens=5)


@pytest.mark.parametrize(
    ("slowdown", "rounds"),
    [
        (lambda call: 1.0, 3),
        (lambda call: 1.2 if call % 4 == 3 else 1.0, 12),  # the child, every second time
        (lambda call: 1.2 if call % 4 > 1 else 1.0, 3),  # both: their ratio stays
    ],
)
def test_more_rounds_where_the_ratio_scatters(
    slowdown: Callable[[int], float], rounds: int, parent: Parent, use: Callable[[FakeEngine], FakeEngine]
) -> None:
    engine = use(FakeEngine(slowdown))
    child = Architecture.parse(["kv2+w16"] * len(parent.architecture.blocks))
    samples = time_models([(parent.config, 2), (child.configure(parent.config), 3)], SCENARIO, 3)
    assert [len(each) for each in samples] == [rounds, rounds]
    assert engine.calls == [(parent.architecture.blocks, 2), (child.blocks, 3)] * rounds


def test_the_caller_may_know_that_it_is_enough(parent: Parent, use: Callable[[FakeEngine], FakeEngine]) -> None:
    use(FakeEngine(lambda call: 1 + call % 2))
    (samples,) = time_models([(parent.config, 2)], SCENARIO, 2, enough=lambda samples: len(samples[0]) == 5)
    assert len(samples) == 5


def test_times_are_lower_quartiles() -> None:
    samples = [Sample(prefill_ms=prefill, decode_ms=10 - prefill) for prefill in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert summarise(samples) == Sample(prefill_ms=2.0, decode_ms=6.0)
    assert summarise(samples).request_ms(4) == 2.0 + 3 * 6.0
    assert summarise(samples[:1]) == samples[0]


@pytest.mark.parametrize("count", [3, 4, 5, 10, 40])
def test_relative_standard_error_of_normal_times(count: int) -> None:
    """Of the lower quartile of times with a standard deviation of 5 %, against 4000 draws."""
    rng = random.Random(count)
    draws = [[rng.gauss(100, 5) for _ in range(count)] for _ in range(4000)]
    quartiles = [statistics.quantiles(draw, method="inclusive")[0] for draw in draws]
    expected = statistics.stdev(quartiles) / statistics.mean(quartiles)
    assert statistics.mean(map(relative_standard_error, draws)) == pytest.approx(expected, rel=0.1)


def test_the_ratio_of_what_slows_together_is_known() -> None:
    slow = [1.0, 2.0, 1.5]
    first, second = ([Sample(prefill_ms=ms * by, decode_ms=by) for by in slow] for ms in (3.0, 7.0))
    assert ratio_standard_error([first, second], SCENARIO) == pytest.approx(0.0)
    assert ratio_standard_error([first], SCENARIO) > 0.1
