"""Whole models timed on the engine: whether they meet a target, and a cost table fitted to what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from puzzle.artefacts import Bounds, CostTable, Scenario, Totals
from puzzle.costs import Sample, relative_standard_error, summarise, time_models
from puzzle.modeling import PuzzleConfig
from puzzle.quantities import COSTS
from puzzle.recipe import TargetSettings
from puzzle.search.tables import resolve_bounds
from puzzle.variants import Architecture

TIMES = ("prefill_ms", "decode_ms")
ROUNDS = 3
"""At least; up to four times as many while the decision is not clear."""
RESERVE = 0.01
"""Share by which a measured model must be better than asked, so that the next measurement finds it so too."""
_MOST_RESERVE = 0.02
"""Where times scatter the reserve is what they are uncertain by, but no more: a margin does not help against noise."""
BUSY = 0.05
"""Uncertainty above which the machine is said to be too busy."""


class Timed(NamedTuple):
    """A time of a whole model in ms: `prefill_ms` or `decode_ms` of the `parent` or the `child`."""

    model: str
    quantity: str
    predicted: float
    measured: float
    uncertainty: float = 0.0
    """Two relative standard errors of the measured one."""

    @property
    def error(self) -> float:
        """The prediction's relative error, without sign; 0 where nothing was measured."""
        return abs(self.predicted / self.measured - 1) if self.measured else 0.0


@dataclass(frozen=True)
class Timing:
    """A child timed beside a reference, usually the parent."""

    target: TargetSettings
    """Relative bounds refer to the reference as measured."""
    predicted: Sequence[Totals]
    """Of the reference and of the child."""
    samples: Sequence[Sequence[Sample]]
    """Of both, one a round."""

    @cached_property
    def utilisation(self) -> float:
        """The largest share of a bound on speed or time that the child takes."""
        return self._utilisation([summarise(rounds) for rounds in self.samples])

    @cached_property
    def uncertainty(self) -> float:
        """Two relative standard errors of it."""
        return 2 * relative_standard_error([self._utilisation(each) for each in zip(*self.samples, strict=True)])

    def _utilisation(self, times: Sequence[Sample]) -> float:
        reference, child = (
            replace(totals, cost=replace(totals.cost, **each._asdict())).as_dict()
            for totals, each in zip(self.predicted, times, strict=True)
        )
        bounds = time_bounds(resolve_bounds(self.target, reference))
        return max(COSTS[key].utilisation(child[key], bound) for key, bound in bounds.items())

    @property
    def missing(self) -> float:
        """Share by which the target is missed, reserve included; 0 if it is met."""
        return max(0.0, self.utilisation * (1 + min(max(RESERVE, self.uncertainty), _MOST_RESERVE)) - 1)

    @property
    def short(self) -> bool:
        """Whether the target is missed by more than noise: only then is another architecture looked for."""
        return self.missing > self.uncertainty

    @property
    def clear(self) -> bool:
        """Whether the target is met, or missed, whatever the noise."""
        met = self.utilisation * (1 + max(RESERVE, self.uncertainty)) <= 1
        return met or self.utilisation * (1 - self.uncertainty) > 1

    @property
    def times(self) -> list[Timed]:
        """Of the child, and of the reference if that has the same batch size."""
        found = []
        reference, child = zip(("parent", "child"), self.predicted, self.samples, strict=True)
        for model, totals, samples in (child, reference):
            for name in TIMES if totals.batch_size == self.predicted[1].batch_size else ():
                predicted, measured = getattr(totals.cost, name), getattr(summarise(samples), name)
                uncertainty = 2 * relative_standard_error([getattr(each, name) for each in samples])
                found.append(Timed(model, name, predicted, measured, uncertainty))
        return found


def time_beside(
    config: PuzzleConfig,
    scenario: Scenario,
    target: TargetSettings,
    models: Sequence[tuple[Sequence[str], int]],
    predicted: Sequence[Totals],
) -> Timing:
    """Time two models in turns, until the target is clearly met or missed, or the utilisation is known to 1 %.

    Args:
        config: the parent's.
        target: of which bounds on speed and time are checked; sizes are known exactly.
        models: the reference and the child, by blocks and batch size.
    """

    def is_known(samples: Sequence[Sequence[Sample]]) -> bool:
        timing = Timing(target, predicted, samples)
        return timing.clear or timing.uncertainty <= RESERVE

    configs = [(Architecture.parse(blocks).configure(config), batch_size) for blocks, batch_size in models]
    return Timing(target, predicted, time_models(configs, scenario, ROUNDS, is_known))


def time_bounds(bounds: Bounds) -> Bounds:
    """Those on speed and time."""
    return {key: bound for key, bound in bounds.items() if key in COSTS and not COSTS[key].exact}


def fitted(table: CostTable, batch_size: int, times: Sequence[Timed]) -> CostTable:
    """The table with its rows at this batch size scaled, and what is fixed shifted, to predict these times best."""
    rows = list(table.rows)
    for name in TIMES:
        fixed = getattr(table.fixed(batch_size), name)
        scale, offset = _line([each for each in times if each.quantity == name], fixed)
        for place, row in enumerate(rows):
            if row.batch_size == batch_size:
                value = scale * getattr(row, name) + (offset if row.part == "fixed" else 0.0)
                rows[place] = replace(row, **{name: value})
    return replace(table, rows=tuple(rows))


def _line(times: Sequence[Timed], fixed: float) -> tuple[float, float]:
    """Scale and offset by least squares of relative errors; a scale alone where predictions are too close to tell both,
    or nothing fixed would be left.
    """
    predicted, measured = np.array([(each.predicted, each.measured) for each in times]).T
    if not measured.all():
        return 1.0, 0.0
    relative = predicted / measured
    if np.ptp(predicted) > 0.1 * predicted.max():
        (scale, offset), *_ = np.linalg.lstsq(np.stack([relative, 1 / measured], axis=1), np.ones(len(times)))
        if scale > 0 and scale * fixed + offset >= 0:
            return float(scale), float(offset)
    return float(relative.sum() / (relative**2).sum()), 0.0
