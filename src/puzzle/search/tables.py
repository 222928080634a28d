"""What is searched: scores, costs and a target, and the choices that follow from them as arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from puzzle.artefacts import Bounds, Cost, CostTable, ScoreTable, Solution, Totals
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, SETTINGS, TIME_TOLERANCE, Quantity
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.constraints import Group, allowed_blocks
from puzzle.search.program import Floats, Ints, Row

_LARGEST = 1e12
"""Terms are clipped to this multiple of their bound: HiGHS refuses larger ones, and they are infeasible anyway."""


def parent_totals(scores: ScoreTable, costs: CostTable) -> dict[str, float]:
    """The parent's predicted totals that relative targets refer to, as `Totals.as_dict`.

    At the allowed batch size where its throughput is highest, the smallest of these if there are several: all
    quantities are of the same parent, served as well as the scenario lets it be.
    """
    totals = [costs.totals(scores.parent_blocks, batch_size).as_dict() for batch_size in sorted(costs.batch_sizes)]
    return max(totals, key=lambda each: each["throughput_tok_s"])


def resolve_bounds(target: TargetSettings, parent: Mapping[str, float], margin: float = 0.0) -> Bounds:
    """The target's bounds as absolute values; `2x` and `80%` are of `parent`, see `parent_totals`.

    Args:
        margin: share by which speeds and times are bounded tighter, since their predictions have errors.
    """
    bounds: Bounds = {}
    for key, quantity in QUANTITIES.items():
        if (amount := getattr(target, quantity.setting)) is None:
            continue
        value = amount.resolve(parent.get(key, 0.0))
        # 1.234 * 1e9 must not end one byte short of 1234000000.
        bounds[key] = math.floor(value + 1e-3) if quantity.exact else quantity.stricter(value, 1 + margin)
        if bounds[key] <= 0:
            raise PuzzleError(f"target.{quantity.setting}: {amount.text} is {value:g}; set more than that")
    return bounds


def violations(values: Mapping[str, float], bounds: Bounds) -> dict[str, float]:
    """The bounds that are violated, each with its `Quantity.violation`."""
    found = {key: QUANTITIES[key].violation(values[key], bound) for key, bound in bounds.items()}
    return {key: share for key, share in found.items() if share > 0}


class Objective(NamedTuple):
    """What is best: the lowest score, or a cost in one scenario."""

    key: str = "score"
    scenario: int = 0
    """0 is the main one."""

    @property
    def quantity(self) -> Quantity:
        return QUANTITIES[self.key]

    def reached(self, solution: Solution) -> float:
        """A solution's value of the quantity."""
        return solution.score if self.key == "score" else solution.servings[self.scenario].predicted[self.key]

    def minimised(self, solution: Solution) -> float:
        """The same so that less is better: of a throughput the seconds a token. A time must be above 0."""
        value, quantity = self.reached(solution), self.quantity
        if quantity.columns and not quantity.exact and value <= 0:
            raise PuzzleError(
                f"cost: {quantity.label} of a model is predicted as {quantity.text(value)}, which is noise; raise "
                "cost.repeats and measure again"
            )
        return 1 / value if quantity.at_least else value


class Demand(NamedTuple):
    """What an architecture must reach in one scenario."""

    setting: str
    """`target`, or `scenarios[0].target`."""
    costs: CostTable
    target: TargetSettings
    parent: dict[str, float]
    """Totals that relative targets refer to."""
    margin: float

    @property
    def asked(self) -> Bounds:
        """The target in absolute numbers."""
        return resolve_bounds(self.target, self.parent)

    @property
    def bounds(self) -> Bounds:
        """The same with the margin: what predictions must meet."""
        return resolve_bounds(self.target, self.parent, self.margin)


class Choices(NamedTuple):
    """Costs and scores of all n choices in one scenario at one batch size. Whole numbers below 2**53 are exact."""

    batch_size: int
    generated_tokens: int
    terms: Mapping[str, Floats]
    """For each quantity its term of the sum over layers, [n]."""
    fixed: Mapping[str, float]
    """For each quantity the term that every architecture has."""

    def rows(self, bounds: Bounds) -> list[Row]:
        """The bounds as rows, divided by their limits: bytes near 1e11 do not meet scores of 1e-4 in one matrix."""
        rows = []
        for key, bound in bounds.items():
            limit = QUANTITIES[key].convert(bound, self.batch_size, self.generated_tokens)
            # Half a byte, or half of the tolerance, so that a sum at the very limit is not lost to rounding.
            limit = np.floor(limit) + 0.5 if QUANTITIES[key].exact else limit * (1 + TIME_TOLERANCE / 2)
            terms = (self.terms[key] / limit).clip(-_LARGEST, _LARGEST)
            rows.append(Row(terms, max((limit - self.fixed[key]) / limit, -_LARGEST)))
        return rows


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is searched, and for what."""

    scores: ScoreTable
    costs: CostTable
    target: TargetSettings = field(default_factory=TargetSettings)
    settings: SearchSettings = field(default_factory=SearchSettings)
    further: Sequence[tuple[CostTable, TargetSettings]] = ()
    """Further scenarios that the same architecture must serve, each with its costs and its target."""
    influence: Callable[[], Sequence[float]] | None = None
    """Reads the block influence of each layer, by which baselines drop layers."""

    @cached_property
    def known_scores(self) -> ScoreTable:
        """Of the blocks that have the score which is added up."""
        return self.scores.having(self.settings.score)

    @cached_property
    def demands(self) -> list[Demand]:
        """Of the main scenario, then of the further ones."""
        further = ((f"scenarios[{place}].target", *each) for place, each in enumerate(self.further))
        return [
            Demand(setting, costs, target, parent_totals(self.known_scores, costs), self.settings.margin)
            for setting, costs, target in (("target", self.costs, self.target), *further)
        ]

    @property
    def objective(self) -> Objective:
        return Objective(SETTINGS[self.settings.objective].key)

    @property
    def bounds(self) -> list[Bounds]:
        """Of each scenario, what predictions must meet."""
        return [demand.bounds for demand in self.demands]

    @cached_property
    def groups(self) -> list[Group]:
        """Which blocks the settings allow in which layers."""
        return allowed_blocks(self.known_scores, self.settings)

    @cached_property
    def group_of(self) -> Ints:
        """[n]: the place in `groups` that each choice belongs to."""
        return np.repeat(np.arange(len(self.groups)), [len(group.blocks) for group in self.groups])

    @cached_property
    def _entries(self) -> list[tuple[list[int], str]]:
        """The layers and the block of each of the n choices."""
        return [(layers, block) for layers, blocks in self.groups for block in blocks]

    @cached_property
    def choices(self) -> list[list[Choices]]:
        """For each scenario the choices at each of its batch sizes."""
        name = self.settings.score
        scores = np.array([sum(self.scores.value(i, block, name) for i in layers) for layers, block in self._entries])

        def at(costs: CostTable, batch_size: int) -> Choices:
            generated = costs.scenario.generated_tokens

            def terms(cost: Cost) -> dict[str, Any]:
                totals = Totals(batch_size=batch_size, generated_tokens=generated, cost=cost)
                return {key: quantity.additive(totals) for key, quantity in QUANTITIES.items()}

            sums = [sum((costs.block(i, block, batch_size) for i in layers), Cost()) for layers, block in self._entries]
            columns: dict[str, Any] = {
                name: np.array([getattr(cost, name) for cost in sums], dtype=np.float64) for name in vars(sums[0])
            }
            every = terms(Cost(**columns)) | {"score": scores}
            return Choices(batch_size, generated, every, terms(costs.fixed(batch_size)))

        return [[at(demand.costs, size) for size in demand.costs.batch_sizes] for demand in self.demands]

    def architecture(self, positions: Ints) -> tuple[str, ...]:
        """One block name a layer, of one choice for each group."""
        chosen = [self._entries[position] for position in positions]
        return tuple(block for _, block in sorted((layer, block) for layers, block in chosen for layer in layers))

    def overlap(self, blocks: Sequence[str]) -> Floats:
        """[n]: in how many layers each choice is what `blocks` has there."""
        return np.array([sum(blocks[layer] == block for layer in layers) for layers, block in self._entries], float)
