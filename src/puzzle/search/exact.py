"""Exact answers over all allowed batch sizes, each checked against the raw tables."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from puzzle.artefacts import Bounds, CostTable, PairTerm, Proof, ScoreName, ScoreTable, Serving, Solution, Totals
from puzzle.errors import PuzzleError
from puzzle.quantities import QUANTITIES, TIME_TOLERANCE
from puzzle.recipe import SearchSettings
from puzzle.search.bounds import excesses, no_time, parent_totals
from puzzle.search.constraints import Allowed, allowed
from puzzle.search.core import minimise_core
from puzzle.search.highs import Relaxation, relax, solver_name
from puzzle.search.links import PairScores, pair_scores, paired, with_kinds, with_pairs
from puzzle.search.problem import Choices, Floats, Ints, Program, Row, bound_rows, build_program, tabulate

_SAME = 1e-9
"""Relative difference below which two sums of scores count as one sum added up in two orders."""
_ZERO = 1e-12
"""So do two sums this close to 0, where terms of both signs cancel."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A further scenario that the same architecture must serve."""

    costs: CostTable
    choices: list[Choices]
    """One per allowed batch size, in the order of the main scenario's."""
    parent: dict[str, float]
    bounds: Bounds


@dataclass(frozen=True, kw_only=True)
class Instance:
    """The tables, and what all searches over them share."""

    scores: ScoreTable
    """Of the blocks that have the score."""
    score: ScoreName
    """What is added up."""
    costs: CostTable
    choices: list[Choices]
    """One per allowed batch size."""
    parent: dict[str, float]
    pairs: Sequence[PairTerm] = ()
    pair_scores: PairScores = field(default_factory=dict)
    """The same, as far as they can be chosen."""
    kinds: int | None = None
    """At most so many distinct blocks."""
    further: Sequence[Part] = ()

    @classmethod
    def of(
        cls,
        scores: ScoreTable,
        costs: CostTable,
        score: ScoreName = "kl",
        *,
        constraints: SearchSettings | None = None,
        rules: Allowed | None = None,
        pairs: Sequence[PairTerm] = (),
        further: Sequence[tuple[CostTable, Bounds]] = (),
    ) -> "Instance":
        """What is to be searched.

        Args:
            constraints: of which `fix`, `forbid`, `equal` and `kinds` are kept to.
            rules: what these but for `kinds` leave, if that is known already.
            pairs: terms that are added to the sum of scores.
            further: cost tables of further scenarios, and the bounds there.
        """
        scores = scores.having(score)
        settings = constraints or SearchSettings()
        rules = allowed(scores, settings) if rules is None else rules
        return cls(
            scores=scores,
            score=score,
            costs=costs,
            choices=tabulate(scores, costs, score, rules),
            parent=parent_totals(scores, costs),
            pairs=pairs,
            pair_scores=pair_scores(pairs, rules),
            kinds=settings.kinds,
            further=[
                Part(
                    costs=other,
                    choices=tabulate(scores, other, score, rules),
                    parent=parent_totals(scores, other),
                    bounds=bounds,
                )
                for other, bounds in further
            ],
        )

    def total(self, blocks: Sequence[str]) -> float:
        """The summed score of an architecture, pair terms included, from the raw tables."""
        together = sum(
            pair.score for pair in self.pairs if tuple(blocks[layer] for layer in pair.layers) == tuple(pair.blocks)
        )
        return self.scores.total(blocks, self.score) + together


@dataclass(frozen=True)
class Objective:
    """What is best when it is lowest: the score, or a sum over layers; of the throughput the seconds a token."""

    name: str = "score"
    """`score`, or one of `QUANTITIES`."""
    place: int = 0
    """In which scenario: the main one, or the further ones from 1."""

    def terms(self, combination: Sequence[Choices]) -> Floats:
        choices = combination[self.place]
        return self._unit(choices) * choices.terms(self.name)

    def constant(self, combination: Sequence[Choices]) -> float:
        choices = combination[self.place]
        return self._unit(choices) * choices.constant(self.name)

    def value(self, candidate: "Candidate") -> float:
        if self.name == "score":
            return candidate.score
        totals, quantity = (candidate.totals, *candidate.further)[self.place], QUANTITIES[self.name]
        value = quantity.value(totals)
        if quantity.at_least and value <= 0:
            raise no_time(totals.request_ms)
        return 1 / value if quantity.at_least else value

    def stated(self, value: float) -> float:
        """In the terms of the quantity."""
        return 1 / value if self._at_least else value

    def reached(self, solution: Solution) -> float:
        """What a solution has of it, in the terms of the quantity."""
        if self.name == "score":
            return solution.score
        return [solution.predicted, *(serving.predicted for serving in solution.further)][self.place][self.name]

    @property
    def _at_least(self) -> bool:
        return self.name in QUANTITIES and QUANTITIES[self.name].at_least

    def _unit(self, choices: Choices) -> float:
        return 1e-3 / (choices.batch_size * choices.generated_tokens) if self._at_least else 1.0


SCORE = Objective()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An architecture at a batch size, evaluated from the raw tables."""

    blocks: tuple[str, ...]
    score: float
    totals: Totals
    further: tuple[Totals, ...] = ()
    """In the further scenarios."""

    def beats(self, other: "Candidate | None", objective: Objective = SCORE) -> bool:
        """A lower value of the objective; or the same, and faster, or where that is the objective a lower score."""
        if other is None:
            return True
        own, its = objective.value(self), objective.value(other)
        if not same_sum(own, its):
            return own < its
        if objective.name == "score":
            return self.totals.throughput_tok_s > other.totals.throughput_tok_s
        return self.score < other.score

    def solution(
        self, parent: dict[str, float], bounds: Bounds, proof: Proof | None, further: Sequence[Part] = ()
    ) -> Solution:
        broken = excesses(self.totals, bounds)
        assert not broken, f"a solution breaks its bounds, by shares of {broken}"
        return Solution(
            blocks=self.blocks,
            batch_size=self.totals.batch_size,
            score=self.score,
            predicted=self.totals.as_dict(),
            parent=parent,
            asked=bounds,
            bounds=bounds,
            proof=proof,
            further=tuple(
                Serving(
                    scenario=part.costs.scenario,
                    batch_size=totals.batch_size,
                    predicted=totals.as_dict(),
                    parent=part.parent,
                    asked=part.bounds,
                    bounds=part.bounds,
                )
                for totals, part in zip(self.further, further, strict=True)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """One program: the choices at a batch size in every scenario, and what the relaxation says of them."""

    choices: tuple[Choices, ...]
    """In the main scenario, then in the further ones; the same entries in all."""
    program: Program
    relaxation: Relaxation
    constant: float

    @property
    def bound(self) -> float:
        return self.constant + self.relaxation.bound


def best_architecture(
    instance: Instance,
    bounds: Bounds,
    settings: SearchSettings,
    objective: Objective = SCORE,
    *,
    others: Sequence[Sequence[str]] = (),
    differing: int = 1,
) -> Solution | None:
    """The architecture with the lowest summed score within `bounds` at any allowed batch size; None if there is none.

    The paper solves one program per batch size (section 2.3). Here they go in the order of their linear relaxations'
    bounds until none that is left can reach the best found. Of equal sums at several batch sizes the fastest wins.
    Where there are several scenarios, each combination of their batch sizes is a program.

    Args:
        objective: what is best in place of the score.
        others: architectures from which it must differ in at least `differing` layers.

    Raises:
        PuzzleError: the time limit of every program was over before anything was found or excluded.
    """
    start = time.monotonic()
    best: Candidate | None = None
    proven, lower = True, math.inf
    problems = sorted(_problems(instance, bounds, objective, others, differing), key=lambda problem: problem.bound)
    for problem in problems:
        value = objective.value(best) if best else math.inf
        if problem.bound > value and not (best and same_sum(problem.bound, value)):
            lower = min(lower, problem.bound)
            break
        found, done, bound = _solve(instance, problem, bounds, settings)
        proven, lower = proven and done, min(lower, bound)
        if found and found.beats(best, objective):
            best = found
    if best is None and not proven:
        raise _time_over(settings)
    if best is None:
        return None
    value = objective.value(best)
    reached, bound = objective.stated(value), objective.stated(min(lower, value))
    proof = Proof(
        status="optimal" if proven else "feasible",
        bound=bound,
        # Scores such as a rise in loss may be negative, so that their sum may be about 0 while its bound is not.
        gap=abs(reached - bound) / max(abs(reached), abs(bound)) if bound != reached else 0.0,
        solver=solver_name(),
        seconds=time.monotonic() - start,
    )
    return best.solution(instance.parent, bounds, proof, instance.further)


def same_sum(one: float, other: float) -> bool:
    """Whether two sums are one, added up in two orders."""
    return math.isclose(one, other, rel_tol=_SAME, abs_tol=_ZERO)


def _time_over(settings: SearchSettings) -> PuzzleError:
    return PuzzleError(
        f"search.time_limit_s: {settings.time_limit_s:g} s were over before any architecture within the target was "
        "found or excluded; raise it"
    )


def _problems(
    instance: Instance, bounds: Bounds, objective: Objective, others: Sequence[Sequence[str]], differing: int
) -> Iterator[_Problem]:
    """One for each combination of batch sizes, those left out in which nothing is within the bounds."""
    further = [part.bounds for part in instance.further]
    away = [Row(terms=instance.choices[0].overlap(blocks), limit=float(len(blocks) - differing)) for blocks in others]
    for combination in itertools.product(instance.choices, *(part.choices for part in instance.further)):
        elsewhere = [
            row for choices, its in zip(combination[1:], further, strict=True) for row in bound_rows(choices, its)
        ]
        program = _program(instance, combination, bounds, objective, [*elsewhere, *away])
        relaxation = relax(program)
        if relaxation.bound < math.inf:
            constant = objective.constant(combination)
            yield _Problem(choices=combination, program=program, relaxation=relaxation, constant=constant)


def _program(
    instance: Instance, combination: Sequence[Choices], bounds: Bounds, objective: Objective, rows: Sequence[Row]
) -> Program:
    choices = combination[0]
    apart: Ints | None = paired(choices, instance.pair_scores) if instance.pair_scores else None
    if instance.kinds is not None:
        apart = np.arange(len(choices.blocks))  # what is worse alone may save a kind
    program = build_program(choices, objective.terms(combination), bounds, rows=rows, apart=apart)
    program = with_pairs(program, choices, instance.pair_scores, in_objective=objective.name == "score")
    return program if instance.kinds is None else with_kinds(program, choices, instance.kinds)


def _solve(
    instance: Instance, problem: _Problem, bounds: Bounds, settings: SearchSettings
) -> tuple[Candidate | None, bool, float]:
    """The best candidate of one program, whether that is proven, and the bound on its objective."""
    end = time.monotonic() + settings.time_limit_s
    program, relaxation, choices = problem.program, problem.relaxation, problem.choices
    while True:
        left_s = end - time.monotonic()
        outcome = minimise_core(program, relaxation, gap=settings.gap, time_limit_s=left_s)
        if outcome.positions is None:
            return None, outcome.status == "infeasible", problem.constant + outcome.bound
        blocks = choices[0].architecture(program.entries[outcome.positions])
        tables = [instance.costs, *(part.costs for part in instance.further)]
        totals, *further = (costs.totals(blocks, each.batch_size) for costs, each in zip(tables, choices, strict=True))
        found = Candidate(blocks=blocks, score=instance.total(blocks), totals=totals, further=tuple(further))
        broken = _broken(found, bounds, [part.bounds for part in instance.further])
        if not broken:
            return found, outcome.status == "optimal", problem.constant + outcome.bound
        # The solver's floats cannot tell a byte in 100 GB; exact integers can, and exclude what is that close above.
        assert max(broken) <= TIME_TOLERANCE, f"the solver broke the bounds, by shares of {broken}"
        program = program.without(outcome.positions)
        relaxation = relax(program)


def _broken(found: Candidate, bounds: Bounds, further: Sequence[Bounds]) -> list[float]:
    """By what shares of their limits sums are above them."""
    pairs = zip((found.totals, *found.further), (bounds, *further), strict=True)
    shares = [share for totals, its in pairs for share in excesses(totals, its).values()]
    if "score" in bounds:
        over = (found.score - bounds["score"]) / bounds["score"]
        shares += [over] if over > TIME_TOLERANCE else []
    return shares
