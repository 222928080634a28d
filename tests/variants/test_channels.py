"""Rankings of FFN channels, and the least-squares update for those left, against plain references."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.variants.conftest import activation_moments, spread_activations
from torch import Tensor

from puzzle.variants.least_squares import damping, least_squares_update, rank_channels


def ranked(down_DI: Tensor, activation_NI: Tensor, iterative: bool) -> list[int]:
    return rank_channels(down_DI, activation_moments(activation_NI), iterative=iterative).tolist()


def damped(activation_NI: Tensor) -> Tensor:
    moment_II = activation_moments(activation_NI)["activation_second_moment"]
    return moment_II + torch.diag(damping(moment_II))


def error(down_DI: Tensor, moment_II: Tensor, kept: list[int]) -> float:
    """E||W a - W' a[kept]||^2, W' the least squares of the kept columns, by a solver that knows nothing of ours."""
    left, moment = down_DI.numpy().copy(), moment_II.numpy()
    left[:, kept] -= np.linalg.lstsq(moment[np.ix_(kept, kept)], moment[kept] @ left.T, rcond=None)[0].T
    return float(np.trace(left @ moment @ left.T))


def test_alone_they_are_ranked_by_what_they_add() -> None:
    activation_NI, down_DI = spread_activations(48), torch.randn(32, 48, dtype=torch.float64)
    added = np.abs(activation_NI.numpy()).mean(0) * np.sqrt((down_DI.numpy() ** 2).sum(0))
    assert ranked(down_DI, activation_NI, False) == np.argsort(-added, kind="stable").tolist()


@pytest.mark.parametrize("seed", range(3))
def test_each_removal_is_the_one_that_costs_least(seed: int) -> None:
    """Up to 50 channels, one at a time; the reference tries all that are left and solves from scratch."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    activation_NI = torch.randn(60, 9, generator=generator, dtype=torch.float64) @ mixing + 0.5
    down_DI = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    moment_II, kept, removed = damped(activation_NI), list(range(9)), []
    while len(kept) > 1:
        costs = {channel: error(down_DI, moment_II, [k for k in kept if k != channel]) for channel in kept}
        removed.append(min(kept, key=costs.__getitem__))
        kept.remove(removed[-1])
    assert ranked(down_DI, activation_NI, True) == kept + removed[::-1]


def one_at_a_time(weight: np.ndarray, moment: np.ndarray) -> list[int]:
    """The ranking by an elimination that updates the inverse for every channel."""
    left, removed, inverse = list(range(len(moment))), list[int](), np.linalg.inv(moment)
    while left:
        least = int(np.argmin((weight**2).sum(0) / np.diag(inverse)))
        removed.append(left.pop(least))
        share = inverse[least] / inverse[least, least]
        weight = np.delete(weight - np.outer(weight[:, least], share), least, 1)
        inverse = np.delete(np.delete(inverse - np.outer(inverse[:, least], share), least, 0), least, 1)
    return removed[::-1]


def test_batches_cost_little() -> None:
    """Where several channels go at once, the error is near that of one at a time."""
    generator = torch.Generator().manual_seed(0)
    activation_NI = torch.randn(2000, 160, generator=generator, dtype=torch.float64)
    activation_NI = activation_NI @ torch.randn(160, 160, generator=generator, dtype=torch.float64).triu() + 0.3
    down_DI = torch.randn(24, 160, generator=generator, dtype=torch.float64)
    moment_II = damped(activation_NI)
    independent = ranked(down_DI, activation_NI, False)
    batched = ranked(down_DI, activation_NI, True)
    single = one_at_a_time(down_DI.numpy(), moment_II.numpy())
    assert single != batched
    for width in (40, 80, 120):
        errors = [error(down_DI, moment_II, order[:width]) for order in (single, batched, independent)]
        assert errors[1] < 1.1 * errors[0]
        assert errors[1] < errors[2]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 60), dead=st.integers(0, 3))
def test_more_channels_are_never_worse(seed: int, tokens: int, dead: int) -> None:
    """Whatever calibration saw: fewer tokens than channels, scales far apart, channels that are never active."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (4 * torch.rand(12, generator=generator, dtype=torch.float64) - 2)
    activation_NI = torch.randn(tokens, 12, generator=generator, dtype=torch.float64) * scales
    activation_NI[:, :dead] = 0
    down_DI = torch.randn(5, 12, generator=generator, dtype=torch.float64) / scales
    moment_II, damped_II = activation_moments(activation_NI)["activation_second_moment"], damped(activation_NI)
    for iterative in (False, True):
        ranking, losses = ranked(down_DI, activation_NI, iterative), []
        assert sorted(ranking) == list(range(12))
        for width in range(1, 13):
            kept, left, sliced = torch.tensor(ranking[:width]), down_DI.clone(), down_DI.clone()
            left[:, kept] -= least_squares_update(down_DI, moment_II, kept)
            sliced[:, kept] = 0
            losses.append(float(torch.trace(left @ damped_II @ left.T)))
            # On the moments themselves, what damping costs is never more than what plain slicing would.
            lost = [float(torch.trace(each @ moment_II @ each.T)) for each in (left, sliced)]
            assert lost[0] <= lost[1] + 1e-9 * losses[0]
        assert all(wider <= narrower + 1e-9 * losses[0] for narrower, wider in pairwise(losses))
        assert torch.equal(left, torch.zeros_like(left))
