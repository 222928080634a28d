"""A target asked for is a target met: a solution is timed on the engine before anything of it is built.

Predictions have errors of a few percent (docs/numbers.md). Parent, child and a blend of both are timed whole; where one
is off by more than noise, the table is fitted to them and searched again. Where the child falls short of the target
although its prediction was right, the margin is widened by as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle.artefacts import Bounds, CostTable, ScoreTable, Serving, Solution, Totals
from puzzle.blocks import Architecture, BlockVariant
from puzzle.costs import Timed, Times, fitted, time_architectures
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import TargetSettings
from puzzle.runs import Run, digest
from puzzle.search import excesses, resolve_bounds, search

_SEARCHES = 4
_ROUNDS = 5
_NOISE = 0.01
"""The measured child must be better than asked by this share, so that the next measurement finds it so too."""
_RIGHT = 0.02
"""A prediction that is off by less is not to be told from noise."""


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Predictions of one scenario put to the test."""

    shortfall: float = 0.0
    """By what share measured times are above what the target allows; 0 if they are not."""
    batch_size: int = 0
    timed: tuple[Timed, ...] = ()
    """Models at this batch size; none if the target bounds sizes alone."""

    @property
    def error(self) -> float:
        return max((model.error for model in self.timed), default=0.0)

    def fitted(self, table: CostTable) -> CostTable:
        return fitted(table, self.batch_size, self.timed) if self.timed else table


def confirmed_search(
    run: Run, parent: Parent, scores: ScoreTable, costs: CostTable, further: Sequence[CostTable] = ()
) -> Solution:
    """The recipe's search, repeated until its solution meets the target as measured, in all scenarios.

    If no search gets there, the last solution stands, with a warning.

    Args:
        further: costs in the recipe's further `scenarios`.
    """
    tables, margin = [costs, *further], run.recipe.search.margin
    solution, met = _search(run, scores, tables, margin), None
    for left in reversed(range(_SEARCHES)):
        checks = _checks(run, parent, tables, solution)
        missing = max(check.shortfall for check in checks)
        met = solution if missing == 0 else met
        off = max(check.error for check in checks)
        if left == 0 or (missing == 0 and off <= _RIGHT):
            break
        run.log(f"measured, this is {missing:.1%} short of the target, predictions are off by up to {off:.1%}")
        # What a fit does not mend, more room does.
        if missing and (off <= _RIGHT or tables[0] is not costs):
            margin += missing
        if off > _RIGHT:
            tables = [check.fitted(table) for check, table in zip(checks, tables, strict=True)]
        try:
            found = _search(run, scores, tables, margin)
        except PuzzleError as error:
            run.log_warning(f"nothing has so much room ({error}); a solution above stands")
            break
        if missing == 0 and found.blocks == solution.blocks:
            break
        solution = found
    if met is None:
        run.log_warning(f"the target is still missed by {missing:.1%} as measured; raise search.margin")
    return met or solution


def first_confirmed(
    run: Run, parent: Parent, costs: CostTable, solutions: Sequence[Solution], further: Sequence[CostTable] = ()
) -> Solution:
    """The first of the solutions that meets the target as measured; the last one, timed before, if no other does."""
    for solution in solutions[:-1][:_SEARCHES]:
        missing = _shortfall(run, parent, [costs, *further], solution)
        if missing == 0:
            return solution
        run.log(f"measured, a better architecture is {missing:.1%} short of the target; taking the next one")
    return solutions[-1]


def _search(run: Run, scores: ScoreTable, tables: Sequence[CostTable], margin: float) -> Solution:
    inputs = [digest(scores.to_json()), *(digest(table.to_json()) for table in tables)]
    return search(run, scores, tables[0], inputs, margin, tables[1:])


def _shortfall(run: Run, parent: Parent, tables: Sequence[CostTable], solution: Solution) -> float:
    """In the scenario where it is most."""
    return max(check.shortfall for check in _checks(run, parent, tables, solution))


def _checks(run: Run, parent: Parent, tables: Sequence[CostTable], solution: Solution) -> list[_Check]:
    """Of every scenario.

    Args:
        tables: costs in the main scenario, then in the further ones.
    """
    targets = [run.recipe.target, *(each.target for each in run.recipe.scenarios)]
    servings: list[Solution | Serving] = [solution, *solution.further]
    served = zip(tables, targets, servings, strict=True)
    return [_check(run, parent, solution.blocks, *each) for each in served]


def _check(
    run: Run,
    parent: Parent,
    blocks: Sequence[str],
    costs: CostTable,
    target: TargetSettings,
    serving: Solution | Serving,
) -> _Check:
    """The parent, the child, and a child of every second layer of it, timed in turns."""
    if not _times_only(serving.asked).given():
        return _Check()
    batch_sizes = (int(serving.parent["batch_size"]), *(serving.batch_size,) * 2)
    settings = {
        "target": target.model_dump(mode="json"),
        "blocks": list(blocks),
        "batch_sizes": list(batch_sizes),
    }
    stage = run.stage("confirm", version=2, settings=settings, inputs=(digest(costs.to_json()),))
    if not stage.done:
        child = Architecture(tuple(BlockVariant.parse(name) for name in blocks))
        models = tuple(zip((parent.architecture, child, _blend(parent.architecture, child)), batch_sizes, strict=True))
        times = time_architectures(parent.config, models, costs, _ROUNDS)
        predicted = [costs.totals([block.name for block in model.blocks], size) for model, size in models]
        measured = [_with_times(totals, each) for totals, each in zip(predicted, times, strict=True)]
        asked = resolve_bounds(target, measured[0].as_dict(), margin=_NOISE)
        stage.commit(
            shortfall=max(excesses(measured[1], _times_only(asked)).values(), default=0.0),
            timed=[
                {"predicted": _times(before), "measured": _times(after)}
                for before, after in zip(predicted, measured, strict=True)
                if before.batch_size == serving.batch_size
            ],
        )
    timed = tuple(Timed(**each) for each in stage.facts["timed"])
    return _Check(shortfall=stage.facts["shortfall"], batch_size=serving.batch_size, timed=timed)


def _blend(parent: Architecture, child: Architecture) -> Architecture:
    pairs = enumerate(zip(parent.blocks, child.blocks, strict=True))
    return Architecture(tuple(pair[layer % 2] for layer, pair in pairs))


def _times(totals: Totals) -> tuple[float, float]:
    return totals.cost.prefill_ms, totals.cost.decode_ms


def _with_times(totals: Totals, times: Times) -> Totals:
    """Sizes as counted, times as measured."""
    return replace(totals, cost=replace(totals.cost, prefill_ms=times.prefill_ms, decode_ms=times.decode_ms))


def _times_only(bounds: Bounds) -> Bounds:
    return replace(bounds, memory_bytes=None, params=None, weight_bytes=None, score=None)
