"""Whole models in turns: as many rounds as asked for, and more where they scatter."""

import random
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.costs.conftest import FakeEngine

from puzzle.artefacts import CostTable, Scenario
from puzzle.costs import ENGINES, Sample, doubt, sample_architectures
from puzzle.parents import Parent
from puzzle.variants import Architecture, BlockVariant

COSTS = CostTable(
    scenario=Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=6, generated_tokens=5),
    batch_sizes=(2,),
    rows=(),
)


class Scattering(FakeEngine):
    """Every second time of a model is longer by this share; with `shared`, of all models in the same round."""

    def __init__(self, share: float, shared: bool = False) -> None:
        super().__init__()
        self._share, self._shared = share, shared

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample, again = super().measure(blocks, batch_size), sum(call == self.calls[-1] for call in self.calls) % 2
        slow = 1 + self._share * again * (self._shared or blocks[0].attention.name == "kv2")
        return Sample(prefill_ms=sample.prefill_ms * slow, decode_ms=sample.decode_ms * slow)


@pytest.mark.parametrize(
    ("engine", "rounds"),
    [(Scattering(0.0), 4), (Scattering(0.001), 4), (Scattering(0.2), 16), (Scattering(0.2, shared=True), 4)],
)
def test_what_scatters_is_measured_again(
    engine: Scattering, rounds: int, parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "torch", lambda config, scenario: engine)
    child = Architecture((BlockVariant.parse("kv2+w16"),) * len(parent.architecture.blocks))
    samples = sample_architectures(parent.config, [(parent.architecture, 2), (child, 2)], COSTS, 4)
    assert [len(each) for each in samples] == [rounds, rounds]
    assert [blocks[0].name for blocks, _ in engine.calls[:4]] == ["kv4+w48", "kv2+w16"] * 2


@given(st.integers(0, 1000), st.sampled_from([10, 20, 40]))
def test_doubt_is_two_standard_errors(seed: int, count: int) -> None:
    """Of the lower quartile of times with a standard deviation of 5 %."""
    rng = random.Random(seed)
    draws = [[rng.gauss(100, 5) for _ in range(count)] for _ in range(200)]
    quartiles = [statistics.quantiles(draw, method="inclusive")[0] for draw in draws]
    expected = 2 * statistics.stdev(quartiles) / statistics.mean(quartiles)
    assert statistics.mean(doubt(draw) for draw in draws) == pytest.approx(expected, rel=0.25)
