"""Programs given to HiGHS: silent, one thread, a fixed seed, so that the same program has the same answer."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import highspy
import numpy as np

from puzzle.search.problem import Floats, Ints, Program

_FEASIBILITY = 1e-9
"""By how much a row may be above its limit; rows are divided by their bounds, so below `TIME_TOLERANCE` / 2."""
FAR = 1e4
"""Times a common term of the objective that are far above it. Tolerances are shares of the largest term, so that one
such as 1e9, for "never take this", would make all others equal.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the solver says of one program."""

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    """`optimal` and `infeasible` are proven; `feasible` has a solution, `unknown` none, when the time was over."""
    positions: Ints | None
    """The entry chosen in each layer, [L]."""
    value: float
    """The solution's objective; infinite without one."""
    bound: float
    """No solution has a lower objective: infinite if there is none, minus infinite if nothing is known."""


@dataclass(frozen=True, kw_only=True)
class Relaxation:
    """What the linear relaxation says of all solutions."""

    bound: float
    """No solution has a lower objective; infinite if there is none."""
    reduced: Floats
    """[n]: no solution with this entry has an objective below `bound` plus this, which is at least 0."""
    prices: Floats
    """Of each row: by how much an objective is above `bound` for what a solution leaves of its limit, at least 0."""


def solver_name() -> str:
    return f"HiGHS {highspy.Highs().version()}"


def relax(program: Program) -> Relaxation:
    """The linear relaxation's bound and reduced costs.

    Both are computed anew from the multipliers of the rows, as a Lagrangian bound: valid whatever the multipliers, so
    no tolerance of the solver is in them. Nor need the multipliers know how far the farthest terms are.
    """
    matrix = _Matrix.of(program)
    far = FAR * float(np.median(np.abs(program.objective[program.objective != 0]))) if program.objective.any() else 0.0
    solver, scale = _load(replace(program, objective=program.objective.clip(-far, far)), matrix, whole=False)
    solver.run()
    size, rows = len(program.layers), slice(program.num_layers, program.num_layers + len(program.rows))
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        bound = np.inf if _infeasible(solver) else -np.inf
        return Relaxation(bound=bound, reduced=np.zeros(size), prices=np.zeros(len(program.rows)))
    multipliers = scale * np.asarray(solver.getSolution().row_dual)
    # One block a layer is kept as it is; of the other rows a multiplier may only have the sign of a side that exists.
    multipliers[: program.num_layers] = 0.0
    multipliers[(multipliers > 0) & np.isinf(matrix.lower)] = 0.0
    multipliers[(multipliers < 0) & np.isinf(matrix.upper)] = 0.0
    sides = np.where(multipliers > 0, matrix.lower, matrix.upper)
    used = np.flatnonzero(multipliers)
    weights = np.repeat(multipliers, np.diff(matrix.starts)) * matrix.values
    costs = program.objective - np.bincount(matrix.columns, weights=weights, minlength=len(program.objective))
    lowest = np.minimum.reduceat(costs[:size], np.searchsorted(program.layers, np.arange(program.num_layers)))
    bound = multipliers[used] @ sides[used] + lowest.sum() + np.minimum(costs[size:], 0.0).sum()
    return Relaxation(bound=float(bound), reduced=costs[:size] - lowest[program.layers], prices=-multipliers[rows])


def minimise(program: Program, *, gap: float, time_limit_s: float) -> Outcome:
    """Solve `program` until the best solution is proven to within the relative `gap`, or the time is over."""
    solver, scale = _load(program, _Matrix.of(program), whole=True)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", 0.0)
    solver.setOptionValue("time_limit", max(0.0, time_limit_s))
    solver.run()
    if _infeasible(solver):
        return Outcome(status="infeasible", positions=None, value=np.inf, bound=np.inf)
    info = solver.getInfo()
    bound = scale * float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome(status="unknown", positions=None, value=np.inf, bound=bound)
    columns = np.asarray(solver.getSolution().col_value)
    positions = np.flatnonzero(columns[: len(program.layers)] > 0.5)
    assert (program.layers[positions] == np.arange(program.num_layers)).all(), "the solver chose not one block a layer"
    optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return Outcome(
        status="optimal" if optimal else "feasible",
        positions=positions,
        value=scale * float(info.objective_function_value),
        bound=bound,
    )


def _infeasible(solver: Any) -> bool:
    """Every variable is bounded, so that `unbounded or infeasible` can only mean the latter."""
    kinds = highspy.HighsModelStatus
    return solver.getModelStatus() in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible)


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """All rows of a program, those of one block a layer first, in compressed rows."""

    starts: Ints
    columns: Ints
    values: Floats
    lower: Floats
    upper: Floats

    @classmethod
    def of(cls, program: Program) -> "_Matrix":
        size = len(program.layers)
        rows = [(np.flatnonzero(row.terms), row.terms, row.limit) for row in program.rows]
        links, counts = program.links, np.bincount(program.layers, minlength=program.num_layers)
        lengths = [*counts, *(len(columns) for columns, *_ in rows), *(len(link.columns) for link in links)]
        ones = np.ones(program.num_layers)
        return cls(
            starts=np.cumsum([0, *lengths]),
            columns=np.concatenate(
                [np.arange(size), *(columns for columns, *_ in rows), *(link.columns for link in links)]
            ),
            values=np.concatenate(
                [np.ones(size), *(terms[columns] for columns, terms, _ in rows), *(link.values for link in links)]
            ),
            lower=np.array([*ones, *(-np.inf for _ in rows), *(link.lower for link in links)]),
            upper=np.array([*ones, *(limit for *_, limit in rows), *(link.upper for link in links)]),
        )


def _load(program: Program, matrix: _Matrix, *, whole: bool) -> tuple[Any, float]:
    """A solver with the program in it, and what its objective must be multiplied with."""
    size = len(program.objective)
    scale = float(np.abs(program.objective).max()) or 1.0
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = size, len(matrix.lower)
    model.col_cost_ = program.objective / scale
    model.col_lower_, model.col_upper_ = np.zeros(size), np.ones(size)
    model.row_lower_, model.row_upper_ = matrix.lower, matrix.upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.num_col_, model.a_matrix_.num_row_ = size, len(matrix.lower)
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = (
        matrix.starts,
        matrix.columns,
        matrix.values,
    )
    if whole:
        model.integrality_ = [highspy.HighsVarType.kInteger] * size
    solver = highspy.Highs()
    for option, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": 0,
        "primal_feasibility_tolerance": _FEASIBILITY,
        "mip_feasibility_tolerance": _FEASIBILITY,
        "small_matrix_value": 1e-12,  # terms below it are taken for 0
    }.items():
        solver.setOptionValue(option, value)
    assert solver.passModel(model) != highspy.HighsStatus.kError, "the solver refused the program"
    return solver, scale
