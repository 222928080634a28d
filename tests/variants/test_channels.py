"""Rankings of FFN channels against plain references."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.variants.conftest import activation_moments, spread_activations
from torch import Tensor

from puzzle.variants.least_squares import damping, rank_channels
from puzzle.variants.least_squares import least_squares_update as refit

RANKINGS = [(False, True), (True, False), (True, True)]


def ranked(down_DI: Tensor, activation_NI: Tensor, knowing_the_gone: bool, with_refit: bool) -> list[int]:
    moments = activation_moments(activation_NI)
    ranking = rank_channels(
        down_DI,
        moments["activation_mean_abs"],
        moments["activation_second_moment"],
        iterative=knowing_the_gone,
        with_update=with_refit,
    )
    return ranking.tolist()


def damped(activation_NI: Tensor) -> Tensor:
    moment_II = activation_NI.T @ activation_NI / len(activation_NI)
    return moment_II + torch.diag(damping(moment_II))


def error(down_DI: Tensor, moment_II: Tensor, kept: list[int], *, with_refit: bool) -> float:
    """E||W a - W' a[kept]||^2, W' the kept columns or their least squares, by a solver that knows nothing of ours."""
    weight, moment = down_DI.numpy(), moment_II.numpy()
    left = weight.copy()
    left[:, kept] = 0
    if with_refit:
        solved = np.linalg.lstsq(moment[np.ix_(kept, kept)], moment[kept] @ weight.T, rcond=None)[0].T
        left = weight.copy()
        left[:, kept] -= solved
    return float(np.trace(left @ moment @ left.T))


def test_alone_they_are_ranked_by_their_contribution() -> None:
    activation_NI, down_DI = spread_activations(48), torch.randn(32, 48, dtype=torch.float64)
    contribution = np.abs(activation_NI.numpy()).mean(0) * np.sqrt((down_DI.numpy() ** 2).sum(0))
    found = ranked(down_DI, activation_NI, False, True)
    assert found == np.argsort(-contribution, kind="stable").tolist()


@pytest.mark.parametrize("with_refit", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_each_removal_is_the_one_that_costs_least(seed: int, with_refit: bool) -> None:
    """Up to 50 channels, one at a time; the reference tries all that are left and solves from scratch."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    activation_NI = torch.randn(60, 9, generator=generator, dtype=torch.float64) @ mixing + 0.5
    down_DI = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    moment_II = damped(activation_NI)
    kept = list(range(9))
    removed = []
    while len(kept) > 1:
        costs = {
            channel: error(down_DI, moment_II, [k for k in kept if k != channel], with_refit=with_refit)
            for channel in kept
        }
        removed.append(min(kept, key=costs.__getitem__))
        kept.remove(removed[-1])
    assert ranked(down_DI, activation_NI, True, with_refit) == kept + removed[::-1]


def test_of_two_that_do_the_same_one_stays() -> None:
    """Each alone would be first; with the other there, it is not missed."""
    activation_NI = torch.randn(500, 6, dtype=torch.float64)
    activation_NI[:, 1] = activation_NI[:, 0] = 10 * activation_NI[:, 0]
    down_DI = torch.randn(4, 6, dtype=torch.float64)
    down_DI[:, 1] = down_DI[:, 0]
    ranking = ranked(down_DI, activation_NI, True, True)
    assert sorted([ranking[0], ranking[-1]]) == [0, 1]
    assert sorted(ranked(down_DI, activation_NI, False, True)[:2]) == [0, 1]


def test_batches_cost_little() -> None:
    """Where several channels go at once, the error is near that of one at a time."""
    generator = torch.Generator().manual_seed(0)
    activation_NI = torch.randn(2000, 160, generator=generator, dtype=torch.float64)
    activation_NI = activation_NI @ torch.randn(160, 160, generator=generator, dtype=torch.float64).triu() + 0.3
    down_DI = torch.randn(24, 160, generator=generator, dtype=torch.float64)
    moment_II = damped(activation_NI)
    independent = ranked(down_DI, activation_NI, False, True)
    batched = ranked(down_DI, activation_NI, True, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puzzle.variants.least_squares._BATCH_SHARE", 0.0)
        single = ranked(down_DI, activation_NI, True, True)
    assert single != batched
    for width in (40, 80, 120):
        errors = [
            error(down_DI, moment_II, ranking[:width], with_refit=True) for ranking in (single, batched, independent)
        ]
        assert errors[1] < 1.1 * errors[0]
        assert errors[1] < errors[2]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 60), dead=st.integers(0, 3))
def test_every_ranking_has_all_channels_and_nested_errors(seed: int, tokens: int, dead: int) -> None:
    """Whatever calibration saw: fewer tokens than channels, scales far apart, channels that are never active."""
    activation_NI, down_DI = _random(seed, tokens, dead)
    for knowing_the_gone, with_refit in RANKINGS:
        ranking = ranked(down_DI, activation_NI, knowing_the_gone, with_refit)
        assert sorted(ranking) == list(range(12))
        losses = [_refitted_error(down_DI, activation_NI, ranking[:width]) for width in range(1, 13)]
        assert all(wider <= narrower + 1e-9 * losses[0] for narrower, wider in pairwise(losses))


def test_knowing_what_is_gone_is_better_on_average() -> None:
    """After the refit, over random correlated data, at every width."""
    totals = np.zeros((2, 3))
    for seed in range(30):
        activation_NI, down_DI = _random(seed, 200, 0)
        whole = _refitted_error(down_DI, activation_NI, [])
        for row, knowing_the_gone in enumerate((True, False)):
            ranking = ranked(down_DI, activation_NI, knowing_the_gone, True)
            totals[row] += [_refitted_error(down_DI, activation_NI, ranking[:width]) / whole for width in (3, 6, 9)]
    assert (totals[0] < 0.95 * totals[1]).all()


def _random(seed: int, tokens: int, dead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (2 * torch.rand(12, generator=generator, dtype=torch.float64) - 1)
    activation_NI = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    activation_NI = activation_NI @ torch.randn(12, 12, generator=generator, dtype=torch.float64) * scales
    activation_NI[:, :dead] = 0
    return activation_NI, torch.randn(5, 12, generator=generator, dtype=torch.float64) / scales


def _refitted_error(down_DI: Tensor, activation_NI: Tensor, kept: list[int]) -> float:
    left = down_DI.clone()
    moment_II = activation_moments(activation_NI)["activation_second_moment"]
    left[:, kept] -= refit(down_DI, moment_II, torch.tensor(kept, dtype=torch.long))
    return float(torch.trace(left @ damped(activation_NI) @ left.T))
