"""What every baseline is given, and what it gives back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from puzzle.artefacts import Bounds, ScoreRow
from puzzle.recipe import SearchSettings
from puzzle.search.bounds import excesses
from puzzle.search.constraints import Allowed, allowed
from puzzle.search.exact import Candidate, Instance, best_architecture
from puzzle.search.problem import Choices

Evaluator = Callable[[Sequence[tuple[str, ...]]], list[float]]
"""From architectures, one block name a layer, to what each loses against the parent: the lower the better."""


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
        """The architecture with its totals from the raw tables; None if it breaks a bound or a rule of `search`."""
        score, totals = self.instance.total(blocks), self.instance.costs.totals(blocks, batch_size)
        if excesses(totals, self.bounds) or not self._within_rules(blocks):
            return None
        if self.bounds.score is not None and score > self.bounds.score:
            return None
        return Candidate(blocks=tuple(blocks), score=score, totals=totals)

    def _within_rules(self, blocks: Sequence[str]) -> bool:
        """Whether `search.fix`, `forbid`, `equal` and `kinds` are kept to."""
        first: dict[int, str] = {}
        kept = all(
            block in self._rules.blocks[group] and first.setdefault(group, block) == block
            for group, block in zip(self._rules.groups, blocks, strict=True)
        )
        return kept and (self.settings.kinds is None or len(set(blocks)) <= self.settings.kinds)

    def best(self, propose: Callable[[Choices], Iterable[Sequence[str]]]) -> Candidate | None:
        """The best of what is proposed at each batch size."""
        best: Candidate | None = None
        for choices in self.instance.choices:
            for blocks in propose(choices):
                found = self.candidate(blocks, choices.batch_size)
                if found and found.beats(best):
                    best = found
        return best

    def optimum(self, rows: Iterable[ScoreRow]) -> Candidate | None:
        """The optimum of the program over other rows of KL, within the same bounds and rules."""
        parents_first = sorted(rows, key=lambda row: row.block != self.parent[row.layer])
        scores = replace(self.instance.scores, rows=tuple(parents_first))
        settings = self.settings.model_copy(update={"score": "kl"})
        other = Instance.of(scores, self.instance.costs, constraints=settings)
        found = best_architecture(other, replace(self.bounds, score=None), settings)
        return self.candidate(found.blocks, found.batch_size) if found else None


Baseline = Callable[[Problem], Candidate | None]
"""None where it finds nothing within the bounds."""


def is_noop(block: str) -> bool:
    """Whether a block is a whole layer dropped."""
    return block in ("none+none", "none")
