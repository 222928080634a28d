"""What is searched: scores, costs and a target, and the choices that follow from them as arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from puzzle.artefacts import Bounds, Cost, CostTable, ScoreTable, Totals
from puzzle.quantities import COSTS, QUANTITIES, TIME_TOLERANCE
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import parent_totals, resolve_bounds
from puzzle.search.constraints import Allowed, allowed_blocks
from puzzle.search.program import Floats, Ints, Row, scaled_row

Further = Sequence[tuple[CostTable, TargetSettings]]
"""Further scenarios that the same architecture must serve, each with its costs and its target."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Demand:
    """What an architecture must reach in one scenario."""

    setting: str
    """`target`, or `scenarios[0].target`."""
    costs: CostTable
    target: TargetSettings
    parent: dict[str, float]
    """Totals that relative targets refer to."""
    asked: Bounds
    """The target in absolute numbers."""
    bounds: Bounds
    """The same with the margin: what predictions must meet."""

    @property
    def cost_bounds(self) -> Bounds:
        return {key: bound for key, bound in self.bounds.items() if key != "score"}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Costs and scores of all n choices in one scenario at one batch size. Whole numbers below 2**53 are exact."""

    batch_size: int
    generated_tokens: int
    terms: Mapping[str, Floats]
    """For each quantity its term of the sum over layers, [n]."""
    fixed: Mapping[str, float]
    """For each quantity the term that every architecture has."""

    def rows(self, bounds: Bounds) -> list[Row]:
        return [scaled_row(self.terms[key], self.fixed[key], self._limit(key, bound)) for key, bound in bounds.items()]

    def _limit(self, key: str, bound: float) -> float:
        """The largest sum, fixed term included, that meets the bound; half a byte or half of the tolerance above it, so
        that a sum at the very limit is not lost to rounding.
        """
        limit = QUANTITIES[key].convert(bound, self.batch_size, self.generated_tokens)
        return np.floor(limit) + 0.5 if QUANTITIES[key].exact else limit * (1 + TIME_TOLERANCE / 2)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is searched, and for what."""

    scores: ScoreTable
    costs: CostTable
    target: TargetSettings = field(default_factory=TargetSettings)
    settings: SearchSettings = field(default_factory=SearchSettings)
    further: Further = ()
    allowed: Allowed | None = None
    """In place of what `settings` allow."""
    influence: Callable[[], Sequence[float]] | None = None
    """Reads the block influence of each layer, by which the baseline `depth` drops layers."""

    def with_margin(self, margin: float) -> "Tables":
        return replace(self, settings=self.settings.model_copy(update={"margin": margin}))

    @cached_property
    def parent(self) -> list[str]:
        """The parent's own block of each layer."""
        return self.scores.parent_blocks

    @cached_property
    def demands(self) -> tuple[Demand, ...]:
        """Of the main scenario, then of the further ones."""
        return tuple(
            Demand(
                setting=setting,
                costs=costs,
                target=target,
                parent=(parent := parent_totals(self.known_scores, costs)),
                asked=resolve_bounds(target, parent),
                bounds=resolve_bounds(target, parent, self.settings.margin),
            )
            for setting, costs, target in self.asked
        )

    @property
    def asked(self) -> list[tuple[str, CostTable, TargetSettings]]:
        """For each scenario the name of its target, its costs and its target."""
        further = ((f"scenarios[{place}].target", *each) for place, each in enumerate(self.further))
        return [("target", self.costs, self.target), *further]

    @cached_property
    def known_scores(self) -> ScoreTable:
        """Of the blocks that have the score which is added up."""
        return self.scores.having(self.settings.score)

    def total(self, blocks: Sequence[str]) -> float:
        """The summed score of an architecture."""
        return self.scores.total(blocks, self.settings.score)

    @cached_property
    def rules(self) -> Allowed:
        return self.allowed or allowed_blocks(self.known_scores, self.settings)

    @cached_property
    def groups(self) -> Ints:
        """[n]: which group of layers each choice belongs to."""
        return np.repeat(np.arange(len(self.rules.blocks)), [len(names) for names in self.rules.blocks])

    @cached_property
    def names(self) -> list[str]:
        """The block of each of the n choices."""
        return [name for names in self.rules.blocks for name in names]

    @cached_property
    def choices(self) -> list[list[Choices]]:
        """For each scenario the choices at each of its batch sizes."""
        entries = list(zip(self.groups.tolist(), self.names, strict=True))
        members, score = self.rules.members, self.settings.score
        scores = np.array(
            [sum(self.scores.value(layer, block, score) for layer in members[group]) for group, block in entries]
        )
        assert np.isfinite(scores).all(), "a score that is not finite must not be in the score table"

        def at(costs: CostTable, batch_size: int) -> Choices:
            def terms(cost: Cost) -> list[float]:
                totals = Totals(batch_size=batch_size, generated_tokens=costs.scenario.generated_tokens, cost=cost)
                return [quantity.additive(totals) for quantity in COSTS.values()]

            sums = [
                sum((costs.block(layer, block, batch_size) for layer in members[g]), Cost()) for g, block in entries
            ]
            columns = np.array([terms(cost) for cost in sums], dtype=np.float64).T
            assert np.isfinite(columns).all(), "a cost is not finite"
            return Choices(
                batch_size=batch_size,
                generated_tokens=costs.scenario.generated_tokens,
                terms=dict(zip(COSTS, columns, strict=True)) | {"score": scores},
                fixed=dict(zip(COSTS, terms(costs.fixed(batch_size)), strict=True)) | {"score": 0.0},
            )

        return [[at(demand.costs, size) for size in demand.costs.batch_sizes] for demand in self.demands]

    def architecture(self, positions: Ints) -> tuple[str, ...]:
        """One block name a layer, of one choice for each group."""
        return tuple(self.names[positions[group]] for group in self.rules.groups)

    def overlap(self, blocks: Sequence[str]) -> Floats:
        """[n]: in how many layers each choice is what `blocks` has there."""
        members = self.rules.members
        same = [
            sum(blocks[layer] == name for layer in members[group])
            for group, name in zip(self.groups.tolist(), self.names, strict=True)
        ]
        return np.array(same, dtype=np.float64)
