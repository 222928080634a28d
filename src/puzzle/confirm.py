"""A target asked for is a target met: a solution is timed on the engine before anything of it is built.

Predictions have errors of a few percent (docs/numbers.md), and so have measurements. Parent, child and a blend of both
are timed whole, in turns, until their ratios are sure. Where a prediction is off by more than can be noise, the table
is fitted to them and searched again. Where the child falls short of the target although its prediction was right, the
margin is widened by as much.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from puzzle.artefacts import Bounds, CostTable, ScoreTable, Serving, Solution, Totals
from puzzle.costs import Sample, Timed, fitted, relative_standard_error, summarise, time_models
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.quantities import COSTS, QUANTITIES, SETTINGS
from puzzle.recipe import TargetSettings
from puzzle.runs import Run, digest
from puzzle.search import resolve_bounds, search
from puzzle.variants import Architecture, BlockVariant

_SEARCHES = 4
_ROUNDS = 5
"""More where times scatter."""
_NOISE = 0.01
"""The measured child must be better than asked by this share, so that the next measurement finds it so too; by more
where the measurement is in more doubt."""
_MOST_NOISE = 0.05
"""No more than that: on a machine that busy no margin helps, and a target asked for must stay within reach."""
_RIGHT = 0.02
"""A prediction that is off by less counts as right."""
_MODELS = ("parent", "child", "blend")


def doubt(values: Sequence[float]) -> float:
    """Two standard errors, as a share."""
    return 2 * relative_standard_error(values)


def sample_architectures(
    config: PuzzleConfig, models: Sequence[tuple[Architecture, int]], costs: CostTable, rounds: int
) -> list[list[Sample]]:
    configs = [(architecture.configure(config), batch_size) for architecture, batch_size in models]
    return time_models(configs, costs.scenario, rounds)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Predictions of one scenario put to the test."""

    load: float = 0.0
    """What share the measured child takes of what the target allows."""
    doubt: float = 0.0
    """How far that may be off, as a share of it."""
    batch_size: int = 0
    timed: tuple[Timed, ...] = ()
    """Models at this batch size; none if the target bounds sizes alone."""

    @property
    def shortfall(self) -> float:
        """By what share the target is missed, or not met for sure; 0 if it is."""
        return max(0.0, self.load * (1 + min(max(_NOISE, self.doubt), _MOST_NOISE)) - 1)

    @property
    def error(self) -> float:
        return max((error for model in self.timed for error in model.errors), default=0.0)

    @property
    def right(self) -> bool:
        return all(model.agrees(_RIGHT) for model in self.timed)

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
        missing, right = max(check.shortfall for check in checks), all(check.right for check in checks)
        if missing == 0 and (met is None or _better(solution, met, run.recipe.search.objective)):
            met = solution
        if left == 0 or (missing == 0 and (right or _as_asked(checks, margin))):
            break
        run.log(_found(checks))
        # What a fit does not mend, more room does.
        if missing and (right or tables[0] is not costs):
            margin += missing
        if not right:
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


def _better(one: Solution, other: Solution, objective: str) -> bool:
    if objective == "score":
        return one.score < other.score
    quantity = SETTINGS[objective]
    return quantity.better(one.predicted[quantity.key], other.predicted[quantity.key])


def _as_asked(checks: Sequence[_Check], margin: float) -> bool:
    """Whether the child takes what the target allows but for margin and doubt: a better table would find no better."""
    return any(check.load * (1 + margin + max(_RIGHT, check.doubt)) >= 1 for check in checks)


def _found(checks: Sequence[_Check]) -> str:
    missing, off, doubted = (max(each) for each in zip(*((c.shortfall, c.error, c.doubt) for c in checks), strict=True))
    return (
        f"measured to {doubted:.1%}, this is {missing:.1%} short of the target, predictions are off by up to {off:.1%}"
    )


def first_confirmed(
    run: Run, parent: Parent, costs: CostTable, solutions: Sequence[Solution], further: Sequence[CostTable] = ()
) -> Solution:
    """The first of the solutions that meets the target as measured; the last one, timed before, if no other does."""
    for solution in solutions[:-1][:_SEARCHES]:
        missing = max(check.shortfall for check in _checks(run, parent, [costs, *further], solution))
        if missing == 0:
            return solution
        run.log(f"measured, a better architecture is {missing:.1%} short of the target; taking the next one")
    return solutions[-1]


def checked(run: Run, costs: CostTable) -> list[dict[str, Timed]]:
    """What was timed in the scenario of `costs` after each search of this command, in order; by `_MODELS`."""
    facts = [folder.facts for folder in run.used if folder.name == "confirm" and folder.done]
    return [_models(each) for each in facts if each["scenario"] == str(costs.scenario)]


def _search(run: Run, scores: ScoreTable, tables: Sequence[CostTable], margin: float) -> Solution:
    inputs = [digest(scores.to_json()), *(digest(table.to_json()) for table in tables)]
    return search(run, scores, tables[0], inputs, margin, tables[1:])


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
    if not _times_only(serving.asked):
        return _Check()
    batch_sizes = (int(serving.parent["batch_size"]), *(serving.batch_size,) * 2)
    settings = {
        "target": target.model_dump(mode="json"),
        "blocks": list(blocks),
        "batch_sizes": list(batch_sizes),
    }
    stage = run.stage("confirm", version=3, settings=settings, inputs=(digest(costs.to_json()),))
    if not stage.done:
        child = Architecture(tuple(BlockVariant.parse(name) for name in blocks))
        models = tuple(zip((parent.architecture, child, _blend(parent.architecture, child)), batch_sizes, strict=True))
        samples = sample_architectures(parent.config, models, costs, _ROUNDS)
        predicted = [costs.totals([block.name for block in model.blocks], size) for model, size in models]
        load, doubted = _load(target, predicted, samples)
        if doubted > _MOST_NOISE:
            run.log_warning(f"measured times are only sure to {doubted:.0%}; close other programs")
        stage.commit(
            scenario=str(costs.scenario),
            load=load,
            doubt=doubted,
            timed={
                name: asdict(_timed(before, rounds))
                for name, before, rounds in zip(_MODELS, predicted, samples, strict=True)
                if before.batch_size == serving.batch_size
            },
        )
    facts = stage.facts
    timed = tuple(_models(facts).values())
    return _Check(load=facts["load"], doubt=facts["doubt"], batch_size=serving.batch_size, timed=timed)


def _models(facts: Mapping[str, Any]) -> dict[str, Timed]:
    return {name: Timed(**each) for name, each in facts["timed"].items()}


def _blend(parent: Architecture, child: Architecture) -> Architecture:
    pairs = enumerate(zip(parent.blocks, child.blocks, strict=True))
    return Architecture(tuple(pair[layer % 2] for layer, pair in pairs))


def _load(
    target: TargetSettings, predicted: Sequence[Totals], samples: Sequence[Sequence[Sample]]
) -> tuple[float, float]:
    """What share the child takes of what the target allows, all measured, and how far that may be off."""
    rounds = [_share(target, predicted, each) for each in zip(*samples, strict=True)]
    return _share(target, predicted, [summarise(each) for each in samples]), doubt(rounds)


def _share(target: TargetSettings, predicted: Sequence[Totals], times: Sequence[Sample]) -> float:
    """Of the scarcest, with sizes as counted and these times of parent and child."""
    parent, child, *_ = (_with_times(totals, each) for totals, each in zip(predicted, times, strict=True))
    bounds = _times_only(resolve_bounds(target, parent.as_dict()))
    values = child.as_dict()
    return max(QUANTITIES[name].utilisation(values[name], bound) for name, bound in bounds.items())


def _timed(predicted: Totals, rounds: Sequence[Sample]) -> Timed:
    times, cost = summarise(rounds), predicted.cost
    return Timed(
        predicted=(cost.prefill_ms, cost.decode_ms),
        measured=(times.prefill_ms, times.decode_ms),
        doubt=(doubt([each.prefill_ms for each in rounds]), doubt([each.decode_ms for each in rounds])),
    )


def _with_times(totals: Totals, times: Sample) -> Totals:
    """Sizes as counted, times as measured."""
    return replace(totals, cost=replace(totals.cost, prefill_ms=times.prefill_ms, decode_ms=times.decode_ms))


def _times_only(bounds: Bounds) -> Bounds:
    return {key: bound for key, bound in bounds.items() if key in COSTS and not COSTS[key].exact}
