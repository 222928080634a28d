"""How well one list of numbers orders another."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b: 1 for the same order, -1 for the reverse, ties taken off; None where a list has no order."""
    ranks = _ranks(one), _ranks(other)  # a value may be infinite
    first, second = (np.sign(np.subtract.outer(values, values)) for values in ranks)
    pairs = math.sqrt(float((first != 0).sum()) * float((second != 0).sum()))
    return float((first * second).sum()) / pairs if pairs else None


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rho: the correlation of ranks, those of equals their mean; None where a list has no order."""
    first, second = (_ranks(values) for values in (one, other))
    spread = float(first.std() * second.std())
    return float(((first - first.mean()) * (second - second.mean())).mean()) / spread if spread else None


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    below = np.less.outer(values, values).sum(axis=0)
    equal = np.equal.outer(values, values).sum(axis=0)
    return (below + (equal - 1) / 2).astype(np.float64)
