"""The mixed-integer program (paper section 2.3) and its solver, HiGHS.

    minimise    sum of objective[i] x[i]
    such that   the x[i] of each group of layers add up to 1
                sum of terms[i] x[i] <= limit                 for every row
                x[i] in {0, 1}

n is the number of choices: the blocks that each group of layers may take, group by group.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FEASIBILITY = 1e-9
"""By how much a row may be above its limit; rows are divided by their limits, so below `TIME_TOLERANCE` / 2."""
_OUTLIER = 1e4
"""Terms above this multiple of the median are clipped at first: beside 1e9, for "never", the solver finds others equal.
"""


class Row(NamedTuple):
    """An upper limit on a sum over choices."""

    terms: Floats
    """[n]"""
    limit: float


@dataclass(frozen=True, kw_only=True)
class Program:
    groups: Ints
    """[n]: which group of layers the choice belongs to, ascending from 0."""
    objective: Floats
    """[n]"""
    constant: float
    """What every solution has of the objective."""
    rows: tuple[Row, ...]


class Outcome(NamedTuple):
    """What the solver says of one program."""

    positions: Ints | None
    """The choice of each group; None if there is no solution, or none was found in time."""
    proven: bool
    """That it is optimal, or that there is none."""
    bound: float
    """No solution has a lower objective: infinite if there is none, minus infinite if nothing is known."""


SOLVER = f"HiGHS {highspy.Highs().version()}"


def relax(program: Program) -> float:
    """The optimum of the linear relaxation, below which no solution lies; infinite if even that has none."""
    solver, scale, _ = _solve(program, program.objective, whole=False)
    if _infeasible(solver):
        return np.inf
    solved = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return program.constant + scale * float(solver.getInfo().objective_function_value) if solved else -np.inf


def minimise(program: Program, *, gap: float, time_limit_s: float) -> Outcome:
    """Solve `program` until the best solution is proven to within the relative `gap`, or the time is over."""
    objective, clipped = program.objective, program.objective
    if objective.any():
        clipped = objective.clip(None, _OUTLIER * float(np.median(np.abs(objective[objective != 0]))))
    outcome = _minimise(program, clipped, gap, time_limit_s)
    if outcome.positions is not None and (clipped < objective)[outcome.positions].any():
        return _minimise(program, objective, gap, time_limit_s)
    return outcome


def _minimise(program: Program, objective: Floats, gap: float, time_limit_s: float) -> Outcome:
    options = {"mip_rel_gap": gap, "mip_abs_gap": 0.0, "time_limit": max(0.0, time_limit_s)}
    solver, scale, classes = _solve(program, objective, whole=True, **options)
    if _infeasible(solver):
        return Outcome(None, True, np.inf)
    info = solver.getInfo()
    bound = program.constant + scale * float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome(None, False, bound)
    counts = iter(np.rint(solver.getSolution().col_value).astype(int))
    positions = np.zeros(program.groups[-1] + 1, dtype=np.int64)
    for members in classes:
        chosen = np.repeat(np.arange(len(members[0])), [next(counts) for _ in members[0]])
        for entries, choice in zip(members, chosen, strict=True):
            positions[program.groups[entries[0]]] = entries[choice]
    return Outcome(positions, solver.getModelStatus() == highspy.HighsModelStatus.kOptimal, bound)


def _infeasible(solver: Any) -> bool:
    """Every variable is bounded, so that `unbounded or infeasible` can only mean the latter."""
    kinds = highspy.HighsModelStatus
    return solver.getModelStatus() in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible)


def _solve(program: Program, objective: Floats, *, whole: bool, **given: float) -> tuple[Any, float, list[list[Ints]]]:
    """The solver when it is done, what its objective must be multiplied with, and the classes of groups.

    Groups with the same terms are one class, of which the solver counts how many take each block: to prove by branching
    that it is no matter which of them does takes long. One thread, a fixed seed: the same program has the same answer.
    """
    solver = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "small_matrix_value": 1e-12}
    tolerances = ("primal_feasibility_tolerance", "dual_feasibility_tolerance", "mip_feasibility_tolerance")
    for option, value in (options | dict.fromkeys(tolerances, _FEASIBILITY) | given).items():
        solver.setOptionValue(option, value)
    table = np.stack([objective, *(row.terms for row in program.rows)])
    alike: dict[bytes, list[Ints]] = {}
    starts = np.searchsorted(program.groups, np.arange(program.groups[-1] + 2))
    for entries in map(np.arange, starts, starts[1:]):
        alike.setdefault(table[:, entries].tobytes(), []).append(entries)
    classes = list(alike.values())
    kept = np.concatenate([members[0] for members in classes])
    size, counts = len(kept), [len(members) for members in classes for _ in members[0]]
    scale = float(np.abs(objective).max()) or 1.0
    every = np.arange(size, dtype=np.int32)
    solver.addVars(size, np.zeros(size), np.array(counts, dtype=np.float64))
    solver.changeColsCost(size, every, objective[kept] / scale)
    start = 0
    for members in classes:
        end = start + len(members[0])
        solver.addRow(len(members), len(members), end - start, every[start:end], np.ones(end - start))
        start = end
    for terms, limit in program.rows:
        used = np.flatnonzero(terms[kept]).astype(np.int32)
        status = solver.addRow(-np.inf, limit, len(used), used, terms[kept][used])
        assert status != highspy.HighsStatus.kError, "the solver refused a row"
    if whole:
        solver.changeColsIntegrality(size, every, np.full(size, int(highspy.HighsVarType.kInteger), dtype=np.uint8))
    solver.run()
    return solver, scale, classes
