"""The noise floor of scores: the parent beside itself, run as blocks are."""

from dataclasses import replace

import pytest
import torch
from tests.scores.conftest import Scorer
from tests.search.conftest import ask, cost_row, cost_table, score_table
from torch import Tensor

from puzzle.search.exact import best
from puzzle.streams import Stream


def test_noise_is_what_the_parents_own_block_scores_where_blocks_are_run_otherwise(
    scored: Scorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, memory in ("resident", None), ("streamed", 40_000):  # products of a CPU are the same in any batch
        assert scored(name, precision="bfloat16", memory=memory).noise == 0.0
    forward = Stream.forward

    def disturbed(stream: Stream, layers: range, hidden_BTD: Tensor) -> Tensor:
        states_BTD = forward(stream, layers, hidden_BTD)
        if layers.start == 0:  # the parent, from its embeddings on
            return states_BTD
        shape = states_BTD.shape
        return states_BTD + 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(states_BTD.dtype)

    monkeypatch.setattr(Stream, "forward", disturbed)
    capsys.readouterr()
    noisy = scored("noisy", precision="bfloat16")
    assert 1e-6 < noisy.noise < min(row.kl for row in noisy.layer(0) if row.kl)
    assert f"known to {noisy.noise:.1e} nats" in capsys.readouterr().out
    assert scored("full").noise == 0.0


def test_blocks_below_the_noise_count_as_equal_and_the_parents_as_best() -> None:
    """Without noise two slight cuts look better than one that is a little less slight; with it, one cut is."""
    blocks = ("kv8+w64", 0.0), ("kv4+w64", 1e-6), ("kv2+w64", 9e-6), ("kv1+w64", 0.5)
    scores = score_table([blocks] * 2)
    rows = [cost_row(-1, "fixed", "", 1, decode=1.0)]
    for layer in range(2):
        rows += [cost_row(layer, "attention", f"kv{2**i}", 1, params=2**i, decode=1.0) for i in range(4)]
        rows.append(cost_row(layer, "ffn", "w64", 1))

    def found(noise: float, params: float) -> list[str]:
        solution = best(ask(replace(scores, noise=noise), cost_table(rows, [1])), [{"params": params}])
        assert solution is not None
        return sorted(solution.blocks)

    assert found(0.0, 10) == ["kv4+w64", "kv4+w64"]
    assert found(1e-5, 10) == ["kv2+w64", "kv8+w64"]
    assert found(1e-5, 16) == ["kv8+w64", "kv8+w64"]
    floored = replace(scores, noise=1e-5)
    assert [floored.value(0, name) for name, _ in blocks] == [0.0, 1e-5, 1e-5, 0.5]
    worse = replace(scores, rows=tuple(replace(row, kl=row.kl - 1.0) for row in scores.rows))
    assert worse.value(0, "kv4+w64") == 1e-6 - 1.0  # tables of others may hold any score
