"""An architecture timed on the engine beside a reference, in turns, until it is clear whether it meets a target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from puzzle.artefacts import Bounds, CostTable, Totals
from puzzle.costs import Sample, relative_standard_error, summarise, time_models
from puzzle.modeling import PuzzleConfig
from puzzle.quantities import COSTS
from puzzle.recipe import TargetSettings
from puzzle.search.bounds import resolve_bounds
from puzzle.search.fit import Timed
from puzzle.variants import Architecture

ROUNDS = 3
"""At least; up to four times as many while the decision is not clear."""
RESERVE = 0.01
"""Share by which a measured model must be better than asked, so that the next measurement finds it so too."""
_MOST_RESERVE = 0.02
"""Where times scatter the reserve is what they are uncertain by, but no more: a margin does not help against noise."""
BUSY = 0.05
"""Uncertainty above which the machine is too busy for a decision."""

Model = tuple[Sequence[str], int]
"""Blocks by name, and the batch size."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of an architecture beside the reference, usually the parent."""

    batch_size: int
    utilisation: float
    """The largest share of a bound on speed or time that it takes."""
    uncertainty: float
    """Two relative standard errors of it."""
    reference: Timed
    model: Timed
    same_batch: bool
    """Whether both were timed at one batch size."""

    @property
    def missing(self) -> float:
        """Share by which the target is missed, reserve included; 0 if it is met."""
        return max(0.0, self.utilisation * (1 + min(max(RESERVE, self.uncertainty), _MOST_RESERVE)) - 1)

    @property
    def unclear(self) -> bool:
        """Whether the target may be met or not: the machine is too busy to tell."""
        return self.missing > 0 and self.uncertainty > BUSY and self.utilisation * (1 - self.uncertainty) <= 1

    @property
    def at_batch(self) -> dict[str, Timed]:
        """`child` and, if it was timed at the same batch size, `parent`."""
        return {"child": self.model} | ({"parent": self.reference} if self.same_batch else {})

    def predicted_by(self, costs: CostTable, reference: Model, model: Model) -> "Timing":
        """Beside the predictions of another table."""
        first, second = (costs.totals(*each).cost for each in (reference, model))
        return replace(
            self,
            reference=replace(self.reference, predicted=(first.prefill_ms, first.decode_ms)),
            model=replace(self.model, predicted=(second.prefill_ms, second.decode_ms)),
        )

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Timing":
        """Back from `asdict`, by way of JSON."""
        return cls(**facts | {name: Timed(**facts[name]) for name in ("reference", "model")})


def time_beside(
    config: PuzzleConfig, costs: CostTable, target: TargetSettings, reference: Model, model: Model
) -> Timing:
    """Time `model` and `reference`, whose measured times relative bounds refer to.

    Rounds end as soon as the target is clearly met or clearly missed, or the utilisation is known to 1 %.

    Args:
        config: the parent's.
        target: of which bounds on speed and time are checked; sizes are known exactly.
    """
    predicted = [costs.totals(*each) for each in (reference, model)]

    def measured(samples: Sequence[Sequence[Sample]]) -> tuple[float, float]:
        """Utilisation and its uncertainty."""
        rounds = [_utilisation(target, predicted, each) for each in zip(*samples, strict=True)]
        typical = _utilisation(target, predicted, [summarise(each) for each in samples])
        return typical, 2 * relative_standard_error(rounds)

    def is_clear(samples: Sequence[Sequence[Sample]]) -> bool:
        utilisation, uncertainty = measured(samples)
        met = utilisation * (1 + max(RESERVE, uncertainty)) <= 1
        return met or utilisation * (1 - uncertainty) > 1 or uncertainty <= RESERVE

    models = [(Architecture.parse(blocks).configure(config), batch_size) for blocks, batch_size in (reference, model)]
    samples = time_models(models, costs.scenario, ROUNDS, is_clear)
    utilisation, uncertainty = measured(samples)
    timed = [_timed(*each) for each in zip(predicted, samples, strict=True)]
    return Timing(
        batch_size=model[1],
        utilisation=utilisation,
        uncertainty=uncertainty,
        reference=timed[0],
        model=timed[1],
        same_batch=reference[1] == model[1],
    )


def time_bounds(bounds: Bounds) -> Bounds:
    """Those on speed and time."""
    return {key: bound for key, bound in bounds.items() if key in COSTS and not COSTS[key].exact}


def _utilisation(target: TargetSettings, predicted: Sequence[Totals], times: Sequence[Sample]) -> float:
    """Of the tightest bound, with sizes as counted and these times."""
    reference, model = (
        replace(totals, cost=replace(totals.cost, **each._asdict())).as_dict()
        for totals, each in zip(predicted, times, strict=True)
    )
    bounds = time_bounds(resolve_bounds(target, reference))
    return max(COSTS[key].utilisation(model[key], bound) for key, bound in bounds.items())


def _timed(predicted: Totals, rounds: Sequence[Sample]) -> Timed:
    typical = summarise(rounds)
    return Timed(
        predicted=(predicted.cost.prefill_ms, predicted.cost.decode_ms),
        measured=(typical.prefill_ms, typical.decode_ms),
        uncertainty=(
            2 * relative_standard_error([each.prefill_ms for each in rounds]),
            2 * relative_standard_error([each.decode_ms for each in rounds]),
        ),
    )
