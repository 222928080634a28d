"""The best architecture over all allowed batch sizes, checked against the raw tables, with its proof."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from puzzle.artefacts import Bounds, Proof, Serving, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, TIME_TOLERANCE
from puzzle.search.bounds import violations
from puzzle.search.program import Program, Row, minimise, relax, solver_name
from puzzle.search.tables import Tables

_SAME = 1e-9
"""Relative difference below which two sums of scores count as one sum added up in two orders."""
_ZERO = 1e-12
"""So do two sums this close to 0, where terms of both signs cancel."""


class Objective(NamedTuple):
    """What is best when it is lowest: the score, or a cost in one scenario; of a throughput the seconds a token."""

    key: str = "score"
    scenario: int = 0
    """0 is the main one."""

    @property
    def at_least(self) -> bool:
        return QUANTITIES[self.key].at_least

    def reached(self, solution: Solution) -> float:
        """A solution's value of the quantity."""
        return solution.score if self.key == "score" else solution.servings[self.scenario].predicted[self.key]

    def minimised(self, solution: Solution) -> float:
        value = self.reached(solution)
        if self.at_least and value <= 0:
            raise no_time(solution.servings[self.scenario].predicted["request_ms"])
        return self.converted(value)

    def converted(self, value: float) -> float:
        """From a value of the quantity to what is minimised, or back."""
        return 1 / value if self.at_least else value


SCORE = Objective()


def evaluated(
    tables: Tables, blocks: Sequence[str], batch_sizes: Sequence[int], bounds: Sequence[Bounds] | None = None
) -> Solution:
    """An architecture from the raw tables, without a proof, whether it meets the bounds or not.

    Args:
        batch_sizes: for each scenario. bounds: for each scenario what it is found for, in place of the target's.
    """
    main, *further = (
        Serving(
            scenario=demand.costs.scenario,
            batch_size=batch_size,
            predicted=demand.costs.totals(blocks, batch_size).as_dict(),
            parent=demand.parent,
            asked=demand.asked,
            bounds=demand.bounds if bounds is None else bounds[place],
        )
        for place, (demand, batch_size) in enumerate(zip(tables.demands, batch_sizes, strict=True))
    )
    values = {field.name: getattr(main, field.name) for field in fields(main) if field.name != "scenario"}
    return Solution(blocks=tuple(blocks), score=tables.total(blocks), proof=None, further=tuple(further), **values)


def broken(solution: Solution) -> list[float]:
    """By what shares its bounds are violated, in all scenarios."""
    return [
        share
        for serving in solution.servings
        for share in violations(serving.predicted | {"score": solution.score}, serving.bounds).values()
    ]


def beats(one: Solution, other: Solution | None, objective: Objective = SCORE) -> bool:
    """A better value of the objective; if that is equal, a higher throughput, or a lower score."""
    if other is None:
        return True
    own, its = objective.minimised(one), objective.minimised(other)
    if not same_sum(own, its):
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
    gap: float | None = None,
) -> Solution | None:
    """The architecture with the lowest summed score within the bounds at any allowed batch size; None if there is none.

    The paper solves one program per batch size (section 2.3). Here they go in the order of their linear relaxations'
    bounds until none that is left can reach the best found. Of equal sums at several batch sizes the fastest wins.
    Where there are several scenarios, each combination of their batch sizes is a program.

    Args:
        bounds: for each scenario, in place of the target's.
        objective: what is best in place of the score.
        others: architectures from which it must differ in at least `differing` layers.
        gap: in place of `search.gap`.

    Raises:
        PuzzleError: the time limit of every program was over before anything was found or excluded.
    """
    start = time.monotonic()
    bounds = [demand.bounds for demand in tables.demands] if bounds is None else bounds
    away = [Row(tables.overlap(blocks), float(len(blocks) - differing)) for blocks in others]
    found: Solution | None = None
    proven, lower = True, math.inf
    for program in _programs(tables, bounds, objective, away):
        value = objective.minimised(found) if found else math.inf
        if program.relaxed > value and not same_sum(program.relaxed, value):
            lower = min(lower, program.relaxed)
            break
        candidate, done, bound = _optimum(tables, program, bounds, tables.settings.gap if gap is None else gap)
        proven, lower = proven and done, min(lower, bound)
        if candidate and beats(candidate, found, objective):
            found = candidate
    if found is None and proven:
        return None
    if found is None:
        raise PuzzleError(
            f"search.time_limit_s: {tables.settings.time_limit_s:g} s were over before any architecture within the "
            "target was found or excluded; raise it"
        )
    value = objective.minimised(found)
    reached, bound = objective.converted(value), objective.converted(min(lower, value))
    proof = Proof(
        status="optimal" if proven else "feasible",
        bound=bound,
        # Scores such as a rise in loss may be negative, so that their sum may be about 0 while its bound is not.
        gap=abs(reached - bound) / max(abs(reached), abs(bound)) if bound != reached else 0.0,
        solver=solver_name(),
        seconds=time.monotonic() - start,
    )
    return replace(found, proof=proof)


def same_sum(one: float, other: float) -> bool:
    """Whether two sums are one, added up in two orders."""
    return math.isclose(one, other, rel_tol=_SAME, abs_tol=_ZERO)


def no_time(predicted_ms: float) -> PuzzleError:
    return PuzzleError(
        f"cost: a model is predicted to take {predicted_ms:g} ms, which is noise; raise cost.repeats and measure again"
    )


@dataclass(frozen=True, kw_only=True)
class _Batched:
    """The program at one batch size of every scenario."""

    program: Program
    constant: float
    """What every architecture has of the objective."""
    batch_sizes: list[int]
    relaxed: float
    """Bound on the objective by the linear relaxation."""


def _programs(tables: Tables, bounds: Sequence[Bounds], objective: Objective, away: Sequence[Row]) -> list[_Batched]:
    """For each combination of batch sizes, the most promising first, but those whose relaxation has no solution."""
    found = []
    combinations = list(itertools.product(*tables.choices))
    for choices in combinations:
        rows = [row for each, its in zip(choices, bounds, strict=True) for row in each.rows(its)]
        own = choices[objective.scenario]
        unit = 1e-3 / (own.batch_size * own.generated_tokens) if objective.at_least else 1.0
        program = Program(groups=tables.groups, objective=unit * own.terms[objective.key], rows=(*rows, *away))
        constant = unit * own.fixed[objective.key]
        relaxed = constant + relax(program) if len(combinations) > 1 else -math.inf
        if relaxed < math.inf:
            sizes = [each.batch_size for each in choices]
            found.append(_Batched(program=program, constant=constant, batch_sizes=sizes, relaxed=relaxed))
    return sorted(found, key=lambda batched: batched.relaxed)


def _optimum(
    tables: Tables, batched: _Batched, bounds: Sequence[Bounds], gap: float
) -> tuple[Solution | None, bool, float]:
    """The best solution of one program, whether that is proven, and the bound on its objective."""
    end, program = time.monotonic() + tables.settings.time_limit_s, batched.program
    while True:
        outcome = minimise(program, gap=gap, time_limit_s=end - time.monotonic())
        bound = batched.constant + outcome.bound
        if outcome.positions is None:
            return None, outcome.status == "infeasible", bound
        found = evaluated(tables, tables.architecture(outcome.positions), batched.batch_sizes, bounds)
        shares = broken(found)
        if not shares:
            return found, outcome.status == "optimal", bound
        # The solver's floats cannot tell a byte in 100 GB; exact integers can, and exclude what is that close above.
        assert max(shares) <= TIME_TOLERANCE, f"the solver broke the bounds, by shares of {shares}"
        program = program.without(outcome.positions)
