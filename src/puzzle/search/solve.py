"""From tables and a target to the solution, or to the reason why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle.artefacts import Bounds, CostTable, PairTerm, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import SETTINGS
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import parent_totals, resolve_bounds
from puzzle.search.exact import Instance, Objective, best_architecture
from puzzle.search.explain import asks, explain
from puzzle.search.notes import notes

Further = Sequence[tuple[CostTable, TargetSettings]]
"""Further scenarios that the same architecture must serve: costs and target of each."""

_DIVERSE_GAP = 1e-3
"""Relative gap of diverse solutions: finer than the scores' own noise, and many times faster than a tighter one."""


def solve(
    scores: ScoreTable,
    costs: CostTable,
    target: TargetSettings,
    settings: SearchSettings,
    *,
    pairs: Sequence[PairTerm] = (),
    further: Further = (),
) -> Solution:
    """The best architecture that meets `target` at one of the table's batch sizes: that of the lowest summed score.

    Args:
        pairs: terms added to the sum where both their blocks are chosen.
        further: other scenarios that the same architecture must serve, each at a batch size of its own.

    Raises:
        PuzzleError: a setting is contradictory, or the target is empty or cannot be met, with what can be reached.
    """
    question = _Question.of(scores, costs, target, settings, pairs, further)
    solution = question.answer()
    asked = asks(question.instance, question.targets, settings.margin)
    found = notes(question.instance, asked, question.bounds, settings, question.objective, solution)
    return replace(solution, notes=found)


def pool(
    scores: ScoreTable,
    costs: CostTable,
    target: TargetSettings,
    settings: SearchSettings,
    count: int,
    differing: int,
    *,
    pairs: Sequence[PairTerm] = (),
    further: Further = (),
) -> list[Solution]:
    """The `count` best architectures, each of which differs from all others in at least `differing` layers.

    The best first; each is proven to be the best of those that differ enough from the ones found before it, for
    `differing` above 1 to a relative gap of 1e-3. Fewer where there are no more, or none is found in time.

    Raises:
        PuzzleError: as `solve`, or `differing` is not from 1 to the number of layers.
    """
    if not 1 <= differing <= scores.num_layers:
        raise PuzzleError(f"pool: found differing {differing}; it must be from 1 to the {scores.num_layers} layers")
    question = _Question.of(scores, costs, target, settings, pairs, further)
    found = [question.answer()]
    if differing > 1:
        settings = settings.model_copy(update={"gap": max(settings.gap, _DIVERSE_GAP)})
    while len(found) < count:
        others = [solution.blocks for solution in found]
        try:
            solution = question.find(settings, others, differing)
        except PuzzleError:
            break  # time was over
        if solution is None:
            break
        found.append(solution)
    largest_first = settings.objective == "throughput"
    return sorted(found, key=question.objective.reached, reverse=largest_first)


def further_bounds(scores: ScoreTable, further: Further, settings: SearchSettings) -> list[tuple[CostTable, Bounds]]:
    """The targets of further scenarios in absolute numbers, each of the parent in its own scenario."""
    scores = scores.having(settings.score)
    return [(costs, resolve_bounds(target, parent_totals(scores, costs), settings.margin)) for costs, target in further]


def with_asked(solution: Solution, targets: Sequence[TargetSettings]) -> Solution:
    """The solution with what was asked, of it and in further scenarios, beside the bounds that have a margin."""
    served = tuple(
        replace(serving, asked=resolve_bounds(target, serving.parent))
        for serving, target in zip(solution.further, targets[1:], strict=True)
    )
    return replace(solution, asked=resolve_bounds(targets[0], solution.parent), further=served)


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is searched, and for what."""

    instance: Instance
    targets: Sequence[TargetSettings]
    """Of the main scenario, and of the further ones."""
    bounds: Bounds
    settings: SearchSettings
    objective: Objective

    @classmethod
    def of(
        cls,
        scores: ScoreTable,
        costs: CostTable,
        target: TargetSettings,
        settings: SearchSettings,
        pairs: Sequence[PairTerm],
        further: Further,
    ) -> "_Question":
        check_asked([target, *(its for _, its in further)], settings)
        others = further_bounds(scores, further, settings)
        instance = Instance.of(scores, costs, settings.score, constraints=settings, pairs=pairs, further=others)
        return cls(
            instance=instance,
            targets=[target, *(its for _, its in further)],
            bounds=resolve_bounds(target, instance.parent, settings.margin),
            settings=settings,
            objective=Objective(SETTINGS[settings.objective].key),
        )

    def answer(self) -> Solution:
        """The best, or why there is none."""
        solution = self.find(self.settings, (), 1)
        if solution is None:
            raise explain(self.instance, self.targets, self.bounds, self.settings)
        return solution

    def find(self, settings: SearchSettings, others: Sequence[Sequence[str]], differing: int) -> Solution | None:
        solution = best_architecture(
            self.instance, self.bounds, settings, self.objective, others=others, differing=differing
        )
        return None if solution is None else with_asked(solution, self.targets)


def check_asked(targets: Sequence[TargetSettings], settings: SearchSettings) -> None:
    """That the main target or a further one bounds something, and the main one the score where the objective is not it.

    Raises:
        PuzzleError: not so.
    """
    if all(value is None for target in targets for _, value in target):
        settable = ", ".join(SETTINGS)
        raise PuzzleError(f"target: nothing is set; set at least one of {settable}, for example `throughput: 2x`")
    if settings.objective == "score" and all(
        value is None for target in targets for name, value in target if name != "score"
    ):
        raise PuzzleError(
            "target.score: alone it is met best by the parent itself; bound a cost too, or set search.objective"
        )
    if settings.objective != "score" and dict(targets[0])["score"] is None:
        raise PuzzleError(
            f"search.objective: {settings.objective} alone would give up all quality; set target.score, the highest "
            "sum of scores that you accept"
        )
