"""The best architecture over all allowed batch sizes, checked against the raw tables, with its proof."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from puzzle.artefacts import Bounds, Proof, Serving, Solution, Totals
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

    def value(self, reached: float) -> float:
        """From a value of the quantity to what is minimised, or back."""
        return 1 / reached if self.at_least else reached

    def reached(self, solution: Solution) -> float:
        """A solution's value of the quantity."""
        if self.key == "score":
            return solution.score
        return solution.servings[self.scenario].predicted[self.key]


SCORE = Objective()


@dataclass(frozen=True)
class Candidate:
    """An architecture at a batch size in each scenario, evaluated from the raw tables."""

    blocks: tuple[str, ...]
    score: float
    totals: tuple[Totals, ...]

    @classmethod
    def of(cls, tables: Tables, blocks: Sequence[str], batch_sizes: Sequence[int]) -> "Candidate":
        pairs = zip(tables.demands, batch_sizes, strict=True)
        totals = tuple(demand.costs.totals(blocks, batch_size) for demand, batch_size in pairs)
        return cls(tuple(blocks), tables.total(blocks), totals)

    @cached_property
    def values(self) -> list[dict[str, float]]:
        """For each scenario the values of all quantities."""
        return [totals.as_dict() | {"score": self.score} for totals in self.totals]

    def minimised(self, objective: Objective) -> float:
        value = self.values[objective.scenario][objective.key]
        if objective.at_least and value <= 0:
            raise no_time(self.totals[objective.scenario].request_ms)
        return objective.value(value)

    def violations(self, bounds: Sequence[Bounds]) -> list[float]:
        """Of all scenarios."""
        return [
            share for values, its in zip(self.values, bounds, strict=True) for share in violations(values, its).values()
        ]

    def beats(self, other: "Candidate | None", objective: Objective = SCORE) -> bool:
        """A lower value of the objective; if that is equal, a higher throughput, or a lower score."""
        if other is None:
            return True
        one, its = self.minimised(objective), other.minimised(objective)
        if not same_sum(one, its):
            return one < its
        if objective.key == "score":
            return self.totals[0].throughput_tok_s > other.totals[0].throughput_tok_s
        return self.score < other.score

    def solution(self, tables: Tables, proof: Proof | None, bounds: Sequence[Bounds] | None = None) -> Solution:
        """As an artefact.

        Args:
            bounds: for each scenario what it was found for, in place of the target's.
        """
        served = [
            Serving(
                scenario=demand.costs.scenario,
                batch_size=totals.batch_size,
                predicted=totals.as_dict(),
                parent=demand.parent,
                asked=demand.asked,
                bounds=demand.bounds if bounds is None else bounds[place],
            )
            for place, (demand, totals) in enumerate(zip(tables.demands, self.totals, strict=True))
        ]
        assert not (broken := self.violations([each.bounds for each in served])), f"bounds are violated by {broken}"
        main = served[0]
        return Solution(
            blocks=self.blocks,
            score=self.score,
            batch_size=main.batch_size,
            predicted=main.predicted,
            parent=main.parent,
            asked=main.asked,
            bounds=main.bounds,
            proof=proof,
            further=tuple(served[1:]),
        )


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
    found: Candidate | None = None
    proven, lower = True, math.inf
    for program in _programs(tables, bounds, objective, away):
        value = found.minimised(objective) if found else math.inf
        if program.relaxed > value and not same_sum(program.relaxed, value):
            lower = min(lower, program.relaxed)
            break
        candidate, done, bound = _optimum(tables, program, bounds, tables.settings.gap if gap is None else gap)
        proven, lower = proven and done, min(lower, bound)
        if candidate and candidate.beats(found, objective):
            found = candidate
    if found is None and proven:
        return None
    if found is None:
        raise PuzzleError(
            f"search.time_limit_s: {tables.settings.time_limit_s:g} s were over before any architecture within the "
            "target was found or excluded; raise it"
        )
    value = found.minimised(objective)
    reached, bound = objective.value(value), objective.value(min(lower, value))
    proof = Proof(
        status="optimal" if proven else "feasible",
        bound=bound,
        # Scores such as a rise in loss may be negative, so that their sum may be about 0 while its bound is not.
        gap=abs(reached - bound) / max(abs(reached), abs(bound)) if bound != reached else 0.0,
        solver=solver_name(),
        seconds=time.monotonic() - start,
    )
    return found.solution(tables, proof, bounds)


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
) -> tuple[Candidate | None, bool, float]:
    """The best candidate of one program, whether that is proven, and the bound on its objective."""
    end, program = time.monotonic() + tables.settings.time_limit_s, batched.program
    while True:
        outcome = minimise(program, gap=gap, time_limit_s=end - time.monotonic())
        bound = batched.constant + outcome.bound
        if outcome.positions is None:
            return None, outcome.status == "infeasible", bound
        found = Candidate.of(tables, tables.architecture(outcome.positions), batched.batch_sizes)
        broken = found.violations(bounds)
        if not broken:
            return found, outcome.status == "optimal", bound
        # The solver's floats cannot tell a byte in 100 GB; exact integers can, and exclude what is that close above.
        assert max(broken) <= TIME_TOLERANCE, f"the solver broke the bounds, by shares of {broken}"
        program = program.without(outcome.positions)
