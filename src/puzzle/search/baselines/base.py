"""What every baseline is given, and what it gives back."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from puzzle.artefacts import Bounds, CostTable, ScoreRow, Totals
from puzzle.recipe import SearchSettings
from puzzle.search.bounds import excesses, without
from puzzle.search.constraints import Allowed, allowed
from puzzle.search.exact import Candidate, Instance, best_architecture
from puzzle.search.problem import Choices, Ints, Program, Row, bound_rows, build_program

Evaluator = Callable[[Sequence[tuple[str, ...]]], list[float]]
"""From architectures, one block name a layer, to what each loses against the parent: the lower the better."""
Combination = tuple[Choices, ...]
"""The choices at a batch size of the main scenario, then at one of each further scenario; the same entries in all."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The tables, the bounds, and what some baselines need beside them (see `solve_baseline`)."""

    instance: Instance
    bounds: Bounds
    settings: SearchSettings
    seed: int
    evaluate: Evaluator
    evaluations: int
    influence: Sequence[float] | None

    @cached_property
    def parent(self) -> list[str]:
        """The parent's own block of each layer."""
        scores = self.instance.scores
        return [scores.parent_row(layer).block for layer in range(scores.num_layers)]

    @cached_property
    def _rules(self) -> Allowed:
        return allowed(self.instance.scores, self.settings)

    def candidate(self, blocks: Sequence[str], batch_size: int) -> Candidate | None:
        """The architecture with its totals from the raw tables; None if it breaks a bound or a rule of `search`.

        A further scenario is served at the fastest of its batch sizes that is within the bounds there.
        """
        score, totals = self.instance.total(blocks), self.instance.costs.totals(blocks, batch_size)
        if excesses(totals, self.bounds) or not self._within_rules(blocks):
            return None
        parts = self.instance.further
        if any(score > its.get("score", math.inf) for its in (self.bounds, *(part.bounds for part in parts))):
            return None
        served = [_fastest(part.costs, blocks, part.bounds) for part in parts]
        further = tuple(totals for totals in served if totals is not None)
        if len(further) < len(parts):
            return None
        return Candidate(blocks=tuple(blocks), score=score, totals=totals, further=further)

    def _within_rules(self, blocks: Sequence[str]) -> bool:
        """Whether `search.fix`, `forbid`, `equal` and `kinds` are kept to."""
        first: dict[int, str] = {}
        kept = all(
            block in self._rules.blocks[group] and first.setdefault(group, block) == block
            for group, block in zip(self._rules.groups, blocks, strict=True)
        )
        return kept and (self.settings.kinds is None or len(set(blocks)) <= self.settings.kinds)

    def combinations(self) -> Iterator[Combination]:
        """Of the batch sizes of all scenarios."""
        return itertools.product(self.instance.choices, *(part.choices for part in self.instance.further))

    def rows(self, combination: Combination) -> list[Row]:
        """Every bound on a cost, in all scenarios."""
        bounds = [self.bounds, *(part.bounds for part in self.instance.further)]
        pairs = zip(combination, bounds, strict=True)
        return [row for choices, its in pairs for row in bound_rows(choices, without(its, "score"))]

    def program(self, combination: Combination, *, apart: Ints | None = None) -> Program:
        """The search's own without bounds on the score; `apart` as in `build_program`."""
        choices = combination[0]
        return build_program(choices, choices.scores, Bounds(), rows=self.rows(combination), apart=apart)

    def best(self, propose: Callable[[Combination], Iterable[Sequence[str]]]) -> Candidate | None:
        """The best of what is proposed at each combination of batch sizes."""
        best: Candidate | None = None
        for combination in self.combinations():
            for blocks in propose(combination):
                found = self.candidate(blocks, combination[0].batch_size)
                if found and found.beats(best):
                    best = found
        return best

    def optimum(self, rows: Iterable[ScoreRow]) -> Candidate | None:
        """The optimum of the program over other rows of KL, within the same bounds and rules."""
        parents_first = sorted(rows, key=lambda row: row.block != self.parent[row.layer])
        scores = replace(self.instance.scores, rows=tuple(parents_first))
        rules = self._rules.among(scores)
        if not all(rules.blocks):
            return None
        settings = self.settings.model_copy(update={"score": "kl"})
        further = [(part.costs, without(part.bounds, "score")) for part in self.instance.further]
        other = Instance.of(scores, self.instance.costs, constraints=settings, rules=rules, further=further)
        found = best_architecture(other, without(self.bounds, "score"), settings)
        return self.candidate(found.blocks, found.batch_size) if found else None


Baseline = Callable[[Problem], Candidate | None]
"""None where it finds nothing within the bounds."""


def _fastest(costs: CostTable, blocks: Sequence[str], bounds: Bounds) -> Totals | None:
    """The totals at the fastest batch size that is within the bounds, if there is one."""
    totals = [costs.totals(blocks, batch_size) for batch_size in sorted(costs.batch_sizes)]
    within = [each for each in totals if not excesses(each, bounds)]
    return max(within, key=lambda each: each.throughput_tok_s, default=None)


def is_noop(block: str) -> bool:
    """Whether a block is a whole layer dropped."""
    return block in ("none+none", "none")
