"""The order of training: a permutation an epoch, the same at any number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.data import RANGES, TokenData, order

seeds = st.integers(-(2**63), 2**63)


@given(seed=seeds, epoch=st.integers(0, 10**6), n=st.integers(1, 200))
def test_order_is_a_permutation_of_its_epoch_and_seed(seed: int, epoch: int, n: int) -> None:
    assert sorted(order(seed, epoch, n)) == list(range(n))
    assert (order(seed, epoch, 64) != order(seed, epoch + 1, 64)).any()
    assert (order(seed, epoch, 64) != order(seed + 1, epoch, 64)).any()


def test_order_never_changes() -> None:
    """A training resumed with a later version must go on in the same order."""
    assert order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Seven sequences that are told apart by their first token."""
    path = tmp_path_factory.mktemp("tokens")
    tokens = np.arange(7, dtype="<u4")[:, None] * np.ones((1, 5), dtype="<u4")
    tokens.tofile(path / "training.bin")
    return TokenData(path, "address", 4, dict.fromkeys(RANGES, 0) | {"training": 7})


def taken(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].tolist()


def test_every_epoch_takes_every_sequence_once(data: TokenData) -> None:
    samples = taken([data.training_batch(step, 3, seed=1) for step in range(7)])  # 21 samples, three epochs
    epochs = [samples[start : start + 7] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs == [order(1, epoch, 7).tolist() for epoch in range(3)]


@given(cut=st.integers(1, 12), step=st.integers(0, 9))
def test_samples_do_not_depend_on_how_batches_are_cut(data: TokenData, cut: int, step: int) -> None:
    whole = data.training_batch(step, 12 * cut, seed=5)
    parts = [data.training_batch(step * cut + part, 12, seed=5) for part in range(cut)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1]), (8, [2]), (9, [3]), (13, [3, 1]), (10**6, [3, 3, 1])])
def test_batches_take_the_first_sequences(data: TokenData, tokens: int, sizes: list[int]) -> None:
    batches = list(data.batches("training", 3, tokens))
    assert [len(batch) for batch in batches] == sizes
    assert taken(batches) == list(range(sum(sizes)))


def test_sequences_by_list_and_by_slice(data: TokenData) -> None:
    assert taken([data.sequences("training", [6, 0, 6])]) == [6, 0, 6]
    found = data.sequences("training", slice(2, 4))
    assert (found[:, 0].tolist(), found.dtype, tuple(found.shape)) == ([2, 3], torch.int64, (2, 5))
    with pytest.raises(IndexError):
        data.sequences("training", [7])
