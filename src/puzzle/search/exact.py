"""The best architecture over all allowed batch sizes, checked against the raw tables, with its proof."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from puzzle.artefacts import Bounds, Proof, Serving, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import TIME_TOLERANCE
from puzzle.search.program import SOLVER, Program, Row, minimise, relax
from puzzle.search.tables import Objective, Tables, violations

SCORE = Objective()


def evaluated(tables: Tables, blocks: Sequence[str], batch_sizes: Sequence[int]) -> Solution:
    """An architecture at a batch size for each scenario, from the raw tables, whether it meets the target or not."""
    main, *further = (
        Serving(
            scenario=demand.costs.scenario,
            batch_size=batch_size,
            predicted=demand.costs.totals(blocks, batch_size).as_dict(),
            parent=demand.parent,
            asked=demand.asked,
            bounds=demand.bounds,
        )
        for demand, batch_size in zip(tables.demands, batch_sizes, strict=True)
    )
    values = {name: value for name, value in vars(main).items() if name != "scenario"}
    score = tables.scores.total(blocks, tables.settings.score)
    return Solution(blocks=tuple(blocks), score=score, proof=None, further=tuple(further), **values)


def broken(solution: Solution, bounds: Sequence[Bounds]) -> list[float]:
    """By what shares bounds are violated, in all scenarios."""
    return [
        share
        for serving, its in zip(solution.servings, bounds, strict=True)
        for share in violations(serving.predicted | {"score": solution.score}, its).values()
    ]


def beats(one: Solution, other: Solution | None, objective: Objective = SCORE) -> bool:
    """A better value of the objective; if that is equal, a higher throughput, or a lower score."""
    if other is None:
        return True
    own, its = objective.minimised(one), objective.minimised(other)
    if not _same_sum(own, its):
        return own < its
    if objective.key == "score":
        return one.predicted["throughput_tok_s"] > other.predicted["throughput_tok_s"]
    return one.score < other.score


def best(
    tables: Tables,
    bounds: Sequence[Bounds] | None = None,
    *,
    objective: Objective = SCORE,
    others: Sequence[Sequence[str]] = (),
    differing: int = 1,
) -> Solution | None:
    """The architecture with the lowest summed score within the bounds at any allowed batch size; None if there is none.

    The paper solves one program per batch size (section 2.3), here for each combination of the scenarios' batch sizes.
    They go in the order of their linear relaxations' bounds until none that is left can reach the best found. Of equal
    sums the fastest wins.

    Args:
        bounds: for each scenario, in place of the target's.
        others: architectures from which it must differ in at least `differing` layers.

    Raises:
        PuzzleError: the time limit was over before anything was found or excluded.
    """
    start = time.monotonic()
    bounds = tables.bounds if bounds is None else bounds
    away = [Row(tables.overlap(blocks), float(len(blocks) - differing)) for blocks in others]
    found: Solution | None = None
    proven, lower = True, math.inf
    for relaxed, batch_sizes, program in _programs(tables, bounds, objective, away):
        value = objective.minimised(found) if found else math.inf
        if relaxed > value and not _same_sum(relaxed, value):
            lower = min(lower, relaxed)
            break
        candidate, done, bound = _optimum(tables, program, batch_sizes, bounds)
        proven, lower = proven and done, min(lower, bound)
        if candidate and beats(candidate, found, objective):
            found = candidate
    if found is None:
        if proven:
            return None
        limit = tables.settings.time_limit_s
        raise PuzzleError(f"search.time_limit_s: {limit:g} s were over before anything was found or excluded; raise it")
    value = objective.minimised(found)
    lower = min(lower, value)
    proof = Proof(
        status="optimal" if proven else "feasible",
        bound=1 / lower if objective.quantity.at_least else lower,
        # Scores such as a rise in loss may be negative, so that their sum may be about 0 while its bound is not.
        gap=abs(value - lower) / max(abs(value), abs(lower)) if lower != value else 0.0,
        solver=SOLVER,
        seconds=time.monotonic() - start,
    )
    return replace(found, proof=proof)


def _same_sum(one: float, other: float) -> bool:
    """Whether two sums are one, added up in two orders; near 0 terms of both signs may cancel."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _programs(
    tables: Tables, bounds: Sequence[Bounds], objective: Objective, away: Sequence[Row]
) -> list[tuple[float, list[int], Program]]:
    """Relaxed bound, batch sizes, program of each combination that may have a solution, the most promising first."""
    found = []
    combinations = list(itertools.product(*tables.choices))
    for choices in combinations:
        own = choices[objective.scenario]
        unit = 1e-3 / (own.batch_size * own.generated_tokens) if objective.quantity.at_least else 1.0
        program = Program(
            groups=tables.group_of,
            objective=unit * own.terms[objective.key],
            constant=unit * own.fixed[objective.key],
            rows=(*(row for each, its in zip(choices, bounds, strict=True) for row in each.rows(its)), *away),
        )
        relaxed = relax(program) if len(combinations) > 1 else -math.inf
        if relaxed < math.inf:
            found.append((relaxed, [each.batch_size for each in choices], program))
    return sorted(found, key=lambda each: each[0])


def _optimum(
    tables: Tables, program: Program, batch_sizes: Sequence[int], bounds: Sequence[Bounds]
) -> tuple[Solution | None, bool, float]:
    """The best solution of one program, whether that is proven, and the bound on its objective."""
    end = time.monotonic() + tables.settings.time_limit_s
    while True:
        outcome = minimise(program, gap=tables.settings.gap, time_limit_s=end - time.monotonic())
        if outcome.positions is None:
            return None, outcome.proven, outcome.bound
        found = evaluated(tables, tables.architecture(outcome.positions), batch_sizes)
        shares = broken(found, bounds)
        if not shares:
            return found, outcome.proven, outcome.bound
        # The solver's floats cannot tell a byte in 100 GB; exact integers can, and exclude what is that close above.
        assert max(shares) <= TIME_TOLERANCE, f"the solver broke the bounds, by shares of {shares}"
        program = replace(program, rows=(*program.rows, Row(tables.overlap(found.blocks), len(found.blocks) - 1.0)))
