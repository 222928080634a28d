"""Rank correlations against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.correct import kendall_tau, spearman

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8)


@given(pairs)
def test_tau_counts_pairs_in_order_and_takes_ties_off(values: list[tuple[int, int]]) -> None:
    one, other = zip(*values, strict=True)
    signs = [(np.sign(one[j] - one[i]), np.sign(other[j] - other[i])) for i in range(len(values)) for j in range(i)]
    untied = [sum(first != 0 for first, _ in signs), sum(second != 0 for _, second in signs)]
    expected = sum(first * second for first, second in signs) / math.sqrt(math.prod(untied)) if all(untied) else None
    found = kendall_tau(one, other)
    assert found == (None if expected is None else pytest.approx(expected))


def test_known_values() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 2, 2, 3], [10, 20, 20, 99]) == pytest.approx(1)
    assert spearman([3, 2, 1], [0.1, 0.2, 0.9]) == pytest.approx(-1)
    assert kendall_tau([1, 1], [1, 2]) is None
    assert spearman([1, 1], [1, 2]) is None
