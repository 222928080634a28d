"""Programs given to HiGHS: silent, one thread, a fixed seed, so that the same program has the same answer."""

from dataclasses import dataclass
from typing import Any, Literal

import highspy
import numpy as np

from puzzle.search.problem import Ints, Program

_FEASIBILITY = 1e-9
"""By how much a row may be above its limit; rows are divided by their bounds, so below `TIME_TOLERANCE` / 2."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the solver says of one program."""

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    """`optimal` and `infeasible` are proven; `feasible` has a solution, `unknown` none, when the time was over."""
    positions: Ints | None
    """The entry chosen in each layer, [L]."""
    bound: float
    """No solution has a lower objective: infinite if there is none, minus infinite if nothing is known."""


def solver_name() -> str:
    return f"HiGHS {highspy.Highs().version()}"


def relaxed_bound(program: Program) -> float:
    """The lower bound of the linear relaxation; infinite if even that has no solution."""
    solver, scale = _load(program, whole=False)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kOptimal:
        return scale * float(solver.getInfo().objective_function_value)
    return np.inf if _infeasible(solver) else -np.inf


def minimise(program: Program, *, gap: float, time_limit_s: float) -> Outcome:
    """Solve `program` until the best solution is proven to within the relative `gap`, or the time is over."""
    solver, scale = _load(program, whole=True)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", 0.0)
    solver.setOptionValue("time_limit", max(0.0, time_limit_s))
    solver.run()
    if _infeasible(solver):
        return Outcome(status="infeasible", positions=None, bound=np.inf)
    info = solver.getInfo()
    bound = scale * float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome(status="unknown", positions=None, bound=bound)
    positions = np.flatnonzero(np.asarray(solver.getSolution().col_value) > 0.5)
    assert (program.layers[positions] == np.arange(program.num_layers)).all(), "the solver chose not one block a layer"
    optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return Outcome(status="optimal" if optimal else "feasible", positions=positions, bound=bound)


def _infeasible(solver: Any) -> bool:
    """Every variable is bounded, so that `unbounded or infeasible` can only mean the latter."""
    kinds = highspy.HighsModelStatus
    return solver.getModelStatus() in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible)


def _load(program: Program, *, whole: bool) -> tuple[Any, float]:
    """A solver with the program in it, and what its objective must be multiplied with."""
    scale = float(np.abs(program.objective).max()) or 1.0
    size = len(program.layers)
    lines = [
        *((np.flatnonzero(program.layers == layer), None, 1.0, 1.0) for layer in range(program.num_layers)),
        *((np.flatnonzero(row.terms), row.terms, -np.inf, row.limit) for row in program.rows),
        *((positions, None, -np.inf, program.num_layers - 1.0) for positions in program.excluded),
    ]
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = size, len(lines)
    model.col_cost_ = program.objective / scale
    model.col_lower_, model.col_upper_ = np.zeros(size), np.ones(size)
    model.row_lower_ = np.array([lower for _, _, lower, _ in lines])
    model.row_upper_ = np.array([upper for _, _, _, upper in lines])
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.num_col_, model.a_matrix_.num_row_ = size, len(lines)
    model.a_matrix_.start_ = np.cumsum([0, *(len(indices) for indices, *_ in lines)])
    model.a_matrix_.index_ = np.concatenate([indices for indices, *_ in lines])
    model.a_matrix_.value_ = np.concatenate(
        [np.ones(len(indices)) if terms is None else terms[indices] for indices, terms, *_ in lines]
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
