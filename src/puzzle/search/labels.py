"""All solutions near the relaxation's bound, enumerated layer by layer: label setting with dominance.

A label is one choice for each of the layers so far: its objective, and its sum in every row. How far a solution is
above the relaxation's bound is the sum of its reduced costs and of its unused limits times their prices. Near the bound
both are small, so few entries and few labels come into question.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puzzle.search.highs import Relaxation
from puzzle.search.problem import Floats, Ints, Program

_DIGITS = 13
"""After the point, to which two sums of the same terms in two orders agree: of rows, which are divided by their bounds,
and of the objective, divided by its largest term near the bound.
"""
_TOO_MANY = 8
"""Times as many labels as are kept, among which dominance is not looked for: it would not leave few enough."""
_CHUNK = 256
"""Labels that are compared with all others at a time."""


@dataclass(frozen=True, kw_only=True)
class Enumeration:
    """The best solution found at most a width above the bound."""

    complete: bool
    """Whether no other solution there is better; not known where there were too many labels."""
    positions: Ints | None
    """The entry chosen in each layer, [L]; None if there is no such solution."""
    value: float
    """The solution's objective; infinite without one."""


def enumerate_near(program: Program, relaxation: Relaxation, width: float, most: int) -> Enumeration:
    """The best solution of `program` with an objective of at most the relaxation's bound and `width`.

    Args:
        most: labels kept at a time, those that promise most.
    """
    assert not program.links, "auxiliary columns cannot be enumerated"
    near = np.flatnonzero(relaxation.reduced <= width)
    scale = float(np.abs(program.objective[near]).max()) or 1.0
    sums = np.stack([program.objective / scale, *(row.terms for row in program.rows)], axis=1)
    limits = np.array([row.limit for row in program.rows]) + 10.0**-_DIGITS
    layers = np.split(near, np.searchsorted(program.layers[near], np.arange(1, program.num_layers)))
    settled = np.array([entries[0] for entries in layers if len(entries) == 1], dtype=np.int64)
    layers = [entries for entries in layers if len(entries) > 1]
    # What decides much goes first: then what is still to come soon says little.
    layers.sort(key=lambda entries: -float(relaxation.prices @ np.ptp(sums[entries, 1:], axis=0)))
    least, largest = _still_to_come(layers, sums[:, 1:], np.min), _still_to_come(layers, sums[:, 1:], np.max)
    labels, reduced, complete = (
        sums[settled].sum(axis=0, keepdims=True),
        relaxation.reduced[settled].sum(keepdims=True),
        True,
    )
    steps: list[tuple[Ints, Ints]] = []
    for place, entries in enumerate(layers, 1):
        before, chosen = np.nonzero(reduced[:, None] + relaxation.reduced[entries] <= width)
        reduced = reduced[before] + relaxation.reduced[entries[chosen]]
        labels = labels[before] + sums[entries[chosen]]
        left = limits - labels[:, 1:]
        above = reduced + np.maximum(left - largest[place], 0.0) @ relaxation.prices
        kept = np.flatnonzero((left >= least[place]).all(axis=1) & (above <= width))
        if len(kept) <= _TOO_MANY * most:
            kept = kept[_undominated(labels[kept])]
        if len(kept) > most:
            complete = False
            kept = kept[np.argsort(above[kept], kind="stable")[:most]]
        labels, reduced = labels[kept], reduced[kept]
        steps.append((before[kept], entries[chosen[kept]]))
    if not len(labels):
        return Enumeration(complete=complete, positions=None, value=np.inf)
    best = int(labels[:, 0].argmin())
    positions = np.sort([*settled, *_trace(steps, best)])
    return Enumeration(complete=complete, positions=positions, value=scale * float(labels[best, 0]))


def _still_to_come(layers: list[Ints], sums: Floats, extreme: Callable[..., Floats]) -> Floats:
    """[L + 1, rows]: the lowest or highest sums of the layers from each on."""
    terms = [extreme(sums[entries], axis=0) for entries in reversed(layers)]
    return np.cumsum([np.zeros(sums.shape[1]), *terms], axis=0)[::-1]


def _trace(steps: list[tuple[Ints, Ints]], label: int) -> list[int]:
    """What the label has chosen."""
    positions = []
    for before, chosen in reversed(steps):
        positions.append(int(chosen[label]))
        label = int(before[label])
    return positions


def _undominated(labels: Floats) -> Ints:
    """Positions of labels that no other is no worse than in every sum, of equal ones the first."""
    rounded = np.round(labels, _DIGITS)
    order = np.lexsort(rounded.T[::-1])
    kept, kept_sums = [], np.empty((0, labels.shape[1]))
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        chunk = chunk[~_is_dominated(rounded[chunk], kept_sums, itself=False)]
        chunk = chunk[~_is_dominated(rounded[chunk], rounded[chunk], itself=True)]
        kept.append(chunk)
        kept_sums = np.concatenate([kept_sums, rounded[chunk]])
    return np.concatenate([*kept, order[:0]])


def _is_dominated(sums: Floats, others: Floats, *, itself: bool) -> NDArray[np.bool_]:
    """Which rows of `sums` some row of `others`, none of which is above it in the first sum, is no worse than.

    Args:
        itself: whether the two are one, so that only earlier rows count.
    """
    no_worse = np.tri(len(sums), k=-1, dtype=bool) if itself else np.ones((len(sums), len(others)), dtype=bool)
    for column, other in zip(sums.T[1:], others.T[1:], strict=True):
        no_worse &= other[None, :] <= column[:, None]
    return np.asarray(no_worse.any(axis=1))
