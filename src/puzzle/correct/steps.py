"""The steps that look for something better than the sum of scores can find, all within the same bounds.

Each proposes architectures that the search finds in tables which know more than the first one; whole architectures are
judged by their true score, and the best one judged so far is the incumbent.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from puzzle.artefacts import WORTH, CostTable, Judged, PairTerm, ScoreTable, Serving, Solution, Step
from puzzle.correct.neighbours import Places, around, matter, pair_term, with_blocks
from puzzle.correct.whole import Blocks, TrueScore
from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.runs import Run
from puzzle.search import excesses, pool, with_asked
from puzzle.units import Amount

_PROPOSALS = 4
"""Of a re-scored search: its best few, since its sums are not exact either, and judging one is cheap."""
_DROPPED = ("none+none", "none")


class Steps:
    """The steps on one solution; their outcome is in `judged`, `steps` and `ranked`.

    Args:
        solution: the search's own, which stays the last resort.
        further: costs in the recipe's further `scenarios`.
    """

    def __init__(
        self,
        run: Run,
        scores: ScoreTable,
        costs: CostTable,
        solution: Solution,
        true: TrueScore,
        further: Sequence[CostTable] = (),
    ) -> None:
        self._run, self._scores, self._costs = run, scores, costs
        self._first, self._true = solution, true
        self._settings = run.recipe.correct
        self._tables = [costs, *further]
        self._asked_for = [
            _of_costs(each) for each in (run.recipe.target, *(its.target for its in run.recipe.scenarios))
        ]
        served: list[Solution | Serving] = [solution, *solution.further]
        self._targets = [
            _as_fast(target, its, solution.blocks, table)
            for target, its, table in zip(self._asked_for, served, self._tables, strict=True)
        ]
        self._search = run.recipe.search.model_copy(update={"margin": 0.0})
        self._solutions: dict[Blocks, Solution] = {}
        self._asked: set[Blocks] = set()
        self.judged: list[Judged] = []
        self.steps: list[Step] = []

    def take(self) -> None:
        """All steps that the settings ask for: those that look elsewhere before those that look around the best."""
        self._offer("search", [self._first])
        wanted = {
            "pool": (self._settings.pool, self._pool),
            "depth": (self._settings.depth, self._depth),
            "rounds": (self._settings.rounds, self._rounds),
            "pairs": (self._settings.pairs, self._pairs),
        }
        for name, (count, step) in wanted.items():
            if count:
                before, asked = self._value, len(self._asked)
                step(count)
                self.steps.append(Step(name=name, evaluated=len(self._asked) - asked, before=before, after=self._value))
                self._run.log(f"correct: {name} {before:.4g} -> {self._value:.4g}")

    def ranked(self) -> list[Solution]:
        """All that are better than the search's own by enough to take its place, the best first, and that one last."""
        value = {judged.blocks: judged.whole.value(self._true.score) for judged in self.judged}
        own = value[self._first.blocks]
        enough = own - WORTH * abs(own) if math.isfinite(own) else own
        better = sorted((blocks for blocks in value if value[blocks] < enough), key=lambda blocks: value[blocks])
        return [self._solutions[each] for each in (*better, self._first.blocks)]

    def pool(self) -> tuple[list[float], list[float]]:
        """Predicted and true values of the search's best solutions."""
        judged = [each for each in self.judged if each.step in ("search", "pool")]
        return [each.predicted for each in judged], [each.whole.value(self._true.score) for each in judged]

    def _pool(self, count: int) -> None:
        """The search's next best solutions too."""
        differing = min(self._settings.differing, self._scores.num_layers)
        self._offer("pool", self._found(self._scores, self._search, count, differing))

    def _depth(self, count: int) -> None:
        """Whole layers removed one after another, each the least missed with those before it gone."""
        empty = {row.layer: row.block for row in self._scores.rows if row.block in _DROPPED}
        removed: dict[int, str] = {}
        for _ in range(min(count, len(empty))):
            options = [removed | {layer: block} for layer, block in empty.items() if layer not in removed]
            values = self._evaluate([with_blocks(self._parent, option) for option in options])
            removed = min(zip(values, options, strict=True), key=lambda pair: pair[0])[1]
            self._offer("depth", self._proposals(self._around(with_blocks(self._parent, removed))))

    def _rounds(self, count: int) -> None:
        """Every block that matters scored again around the incumbent, and searched again, while that helps."""
        for _ in range(count):
            before = self._value
            self._offer("rounds", self._proposals(self._around(self._incumbent.blocks)))
            if self._value >= before:
                return

    def _pairs(self, count: int) -> None:
        """What the pairs of blocks add that the search wants to replace together, until it wants no others."""
        centre = self._incumbent.blocks
        table = self._around(centre)
        known: dict[tuple[tuple[int, str], ...], PairTerm] = {}
        while len(known) < count:
            found = self._proposals(table, known.values())
            self._offer("pairs", found)
            swaps = [[at for at in enumerate(solution.blocks) if at[1] != centre[at[0]]] for solution in found]
            wanted = dict.fromkeys(pair for some in swaps for pair in combinations(some, 2) if pair not in known)
            if not wanted:
                return
            some = [*wanted][: count - len(known)]
            known |= {pair: pair_term(centre, dict(pair), self._evaluate) for pair in some}
        self._offer("pairs", self._proposals(table, known.values()))

    def _around(self, centre: Blocks) -> ScoreTable | None:
        """The scores in `centre` of its own blocks and of those that matter."""
        return around(centre, self._scores, self._matter | set(enumerate(centre)), self._evaluate, self._true.score)

    def _proposals(self, table: ScoreTable | None, pairs: Iterable[PairTerm] = ()) -> list[Solution]:
        if table is None:
            return []
        finite = [pair for pair in pairs if math.isfinite(pair.score)]
        return self._found(table, self._search.model_copy(update={"score": "kl"}), _PROPOSALS, 1, finite)

    def _found(
        self, table: ScoreTable, search: SearchSettings, count: int, differing: int, pairs: Sequence[PairTerm] = ()
    ) -> list[Solution]:
        further = [*zip(self._tables[1:], self._targets[1:], strict=True)]
        try:
            found = pool(table, self._costs, self._targets[0], search, count, differing, pairs=pairs, further=further)
        except PuzzleError as error:  # what the search found stands, and time may be over
            self._run.log(f"correct: nothing is proposed: {error}")
            return []
        return [with_asked(solution, self._asked_for) for solution in found]

    def _offer(self, step: str, solutions: Sequence[Solution]) -> None:
        """Judge what is new; the incumbent is the best of all."""
        new = {solution.blocks: solution for solution in solutions if solution.blocks not in self._solutions}
        self._evaluate([*new])
        for (blocks, solution), whole in zip(new.items(), self._true.scores([*new]), strict=True):
            if step != "search":
                # It is not the optimum of the scores' own sum, so that the proof is not one of it.
                solution = replace(solution, score=self._scores.total(blocks, self._true.score), proof=None)
                self._check(solution)
            self._solutions[blocks] = solution
            self.judged.append(Judged(blocks=blocks, predicted=solution.score, whole=whole, step=step))

    def _check(self, solution: Solution) -> None:
        served: list[Solution | Serving] = [solution, *solution.further]
        for its, table in zip(served, self._tables, strict=True):
            broken = excesses(table.totals(solution.blocks, its.batch_size), its.bounds)
            assert not broken, f"a proposed solution breaks the bounds, by shares of {broken}"

    def _evaluate(self, architectures: Sequence[Blocks]) -> list[float]:
        self._asked.update(architectures)
        return self._true(architectures)

    @property
    def _incumbent(self) -> Judged:
        return min(self.judged, key=lambda judged: judged.whole.value(self._true.score))

    @property
    def _value(self) -> float:
        return self._incumbent.whole.value(self._true.score)

    @cached_property
    def _parent(self) -> Blocks:
        return tuple(self._scores.parent_row(layer).block for layer in range(self._scores.num_layers))

    @cached_property
    def _matter(self) -> Places:
        return matter(self._scores, self._costs, self._first, self._true.score)


def _of_costs(target: TargetSettings) -> TargetSettings:
    """Without the bound on the sum of scores, which says nothing of sums around another centre."""
    return target.model_copy(update={"score": None})


def _as_fast(target: TargetSettings, served: Solution | Serving, blocks: Blocks, costs: CostTable) -> TargetSettings:
    """The target with the bounds on speeds and times that the search kept, margin included, in absolute numbers.

    A solution of a table that was fitted to measurements is as fast as asked whatever this table says: others are then
    to be as fast as it is here.
    """
    predicted = costs.totals(blocks, served.batch_size).as_dict()
    same_table = predicted["request_ms"] == served.predicted["request_ms"]
    kept = served.bounds if same_table else predicted
    timed = [quantity for name, quantity in COSTS.items() if name in served.bounds and not quantity.exact]
    amounts = {each.setting: Amount(kept[each.key], False, f"{kept[each.key]:g}") for each in timed}
    return target.model_copy(update=amounts)
