"""Exact answers over all allowed batch sizes, each checked against the raw tables."""

import math
import time
from dataclasses import dataclass

from puzzle.artefacts import Bounds, CostTable, Proof, ScoreName, ScoreTable, Solution, Totals
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings
from puzzle.search.bounds import QUANTITIES, TIME_TOLERANCE, evaluate_blocks, excesses, parent_totals
from puzzle.search.highs import minimise, relaxed_bound, solver_name
from puzzle.search.problem import Choices, Program, build_program, tabulate

_SAME = 1e-9
"""Relative difference below which two sums of scores count as one sum added up in two orders."""
_ZERO = 1e-12
"""So do two sums this close to 0, where terms of both signs cancel."""


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

    @classmethod
    def of(cls, scores: ScoreTable, costs: CostTable, score: ScoreName = "kl") -> "Instance":
        scores = scores.having(score)
        return cls(
            scores=scores,
            score=score,
            costs=costs,
            choices=tabulate(scores, costs, score),
            parent=parent_totals(scores, costs),
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An architecture at a batch size, evaluated from the raw tables."""

    blocks: tuple[str, ...]
    score: float
    totals: Totals

    def beats(self, other: "Candidate | None") -> bool:
        """A lower score, or the same and faster."""
        if other is None or not math.isclose(self.score, other.score, rel_tol=_SAME, abs_tol=_ZERO):
            return other is None or self.score < other.score
        return self.totals.throughput_tok_s > other.totals.throughput_tok_s

    def solution(self, parent: dict[str, float], bounds: Bounds, proof: Proof | None) -> Solution:
        broken = excesses(self.totals, bounds)
        assert not broken, f"a solution breaks its bounds, by shares of {broken}"
        return Solution(
            blocks=self.blocks,
            batch_size=self.totals.batch_size,
            score=self.score,
            predicted=dict(self.totals.as_dict()),
            parent=parent,
            asked=bounds,
            bounds=bounds,
            proof=proof,
        )


def best_architecture(instance: Instance, bounds: Bounds, settings: SearchSettings) -> Solution | None:
    """The architecture with the lowest summed score within `bounds` at any allowed batch size; None if there is none.

    The paper solves one program per batch size (section 2.3). Here they go in the order of their linear relaxations'
    bounds until none that is left can reach the best found. Of equal sums at several batch sizes the fastest wins.

    Raises:
        PuzzleError: the time limit of every program was over before anything was found or excluded.
    """
    start = time.monotonic()
    programs = [(choices, build_program(choices, choices.scores, bounds)) for choices in instance.choices]
    best: Candidate | None = None
    proven, lower = True, math.inf
    for relaxed, place in sorted((relaxed_bound(program), place) for place, (_, program) in enumerate(programs)):
        if relaxed == math.inf or (best and relaxed > best.score + _SAME * abs(best.score) + _ZERO):
            lower = min(lower, relaxed)
            break
        found, done, bound = _solve(instance, *programs[place], bounds, settings)
        proven, lower = proven and done, min(lower, max(relaxed, bound))
        if found and found.beats(best):
            best = found
    if best is None and not proven:
        raise _time_over(settings)
    if best is None:
        return None
    bound = min(lower, best.score)
    proof = Proof(
        status="optimal" if proven else "feasible",
        bound=bound,
        # Scores such as a rise in loss may be negative, so that their sum may be about 0 while its bound is not.
        gap=(best.score - bound) / max(abs(best.score), abs(bound)) if bound < best.score else 0.0,
        solver=solver_name(),
        seconds=time.monotonic() - start,
    )
    return best.solution(instance.parent, bounds, proof)


def best_value(instance: Instance, name: str, bounds: Bounds, settings: SearchSettings) -> float | None:
    """The best value of a quantity that an architecture within `bounds` has at any batch size; None if there is none.

    Raises:
        PuzzleError: the time limit was over before anything was found or excluded.
    """
    quantity, values, proven = QUANTITIES[name], [], True
    for choices in instance.choices:
        program = build_program(choices, choices.costs[name], bounds)
        found, done, _ = _solve(instance, choices, program, bounds, settings)
        proven = proven and done
        if found:
            total = quantity.additive(found.totals)
            values.append(quantity.convert(total, choices.batch_size, choices.generated_tokens))
    if not values and not proven:
        raise _time_over(settings)
    return quantity.best(values)


def _time_over(settings: SearchSettings) -> PuzzleError:
    return PuzzleError(
        f"search.time_limit_s: {settings.time_limit_s:g} s were over before any architecture within the target was "
        "found or excluded; raise it"
    )


def _solve(
    instance: Instance, choices: Choices, program: Program, bounds: Bounds, settings: SearchSettings
) -> tuple[Candidate | None, bool, float]:
    """The best candidate at one batch size, whether that is proven, and the bound on the program's objective."""
    end = time.monotonic() + settings.time_limit_s
    while True:
        outcome = minimise(program, gap=settings.gap, time_limit_s=end - time.monotonic())
        if outcome.positions is None:
            return None, outcome.status == "infeasible", outcome.bound
        blocks = tuple(choices.blocks[entry] for entry in program.entries[outcome.positions])
        score, totals = evaluate_blocks(instance.scores, instance.costs, blocks, choices.batch_size, instance.score)
        broken = excesses(totals, bounds)
        if not broken:
            found = Candidate(blocks=blocks, score=score, totals=totals)
            return found, outcome.status == "optimal", outcome.bound
        # The solver's floats cannot tell a byte in 100 GB; exact integers can, and exclude what is that close above.
        assert max(broken.values()) <= TIME_TOLERANCE, f"the solver broke the bounds, by shares of {broken}"
        program = program.without(outcome.positions)
