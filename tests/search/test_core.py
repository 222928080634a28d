"""All ways to solve a program agree: enumeration near the bound, HiGHS on the core and on the whole, other solvers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.search import core
from puzzle.search.core import minimise_core
from puzzle.search.highs import minimise, relax
from puzzle.search.labels import enumerate_near
from puzzle.search.problem import Program, Row


def random_program(seed: int, layers: int, blocks: int, rows: int, levels: int | None = None) -> Program:
    """Blocks that cost more where they are better; for ties few `levels` of both, and layers alike in pairs."""
    rng = np.random.default_rng(seed)
    sizes = rng.random((layers, blocks))
    terms = [sizes * rng.lognormal(0, 0.3, sizes.shape) for _ in range(rows)]
    objective = (1 - sizes) ** 2 * rng.lognormal(0, 0.5, (layers, 1)) * rng.lognormal(0, 0.2, sizes.shape)
    if levels:
        objective, *terms = (
            np.repeat(np.round(each[::2] * levels) / levels, 2, axis=0) for each in (objective, *terms)
        )
    total = np.repeat(np.arange(len(objective)), blocks)
    limits = [float(rng.uniform(1.1, 1.6) * each.min(axis=1).sum()) for each in terms]
    return Program(
        num_layers=len(objective),
        layers=total,
        objective=objective.ravel(),
        rows=tuple(Row(terms=each.ravel() / limit, limit=1.0) for each, limit in zip(terms, limits, strict=True)),
        entries=np.arange(total.size),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([None, 8]), st.sampled_from([(1, 4), (1024, 8192)])
)
def test_all_ways_find_the_same(seed: int, rows: int, levels: int | None, labels: tuple[int, int]) -> None:
    program = random_program(seed, 12, 6, rows, levels)
    whole = minimise(program, gap=1e-9, time_limit_s=60)
    relaxation = relax(program)
    assert relaxation.bound <= whole.value + 1e-9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_LABELS", labels)
        found = minimise_core(program, relaxation, gap=1e-9, time_limit_s=60)
    assert (found.status, whole.status) in {("optimal", "optimal"), ("infeasible", "infeasible")}
    if found.positions is None:
        return
    assert whole.positions is not None
    assert found.value == pytest.approx(whole.value, rel=1e-7)
    assert found.bound <= found.value
    assert found.value == pytest.approx(program.objective[found.positions].sum())
    assert all(row.terms[found.positions].sum() <= row.limit + 1e-9 for row in program.rows)
    by_highs = core._by_highs(program, relaxation, 0.0, 1e-9, time.monotonic() + 60)
    assert by_highs.value == pytest.approx(whole.value, rel=1e-7)
    # What the relaxation says of entries and of unused limits holds for this solution.
    unused = [row.limit - row.terms[found.positions].sum() for row in program.rows]
    above = relaxation.reduced[found.positions].sum() + np.array(unused) @ relaxation.prices
    assert relaxation.bound + above == pytest.approx(found.value)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_within_the_gap_is_not_enumerated(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program = random_program(seed, 40, 12, 2)
    relaxation, best = relax(program), minimise(program, gap=1e-9, time_limit_s=60)
    monkeypatch.setattr(core, "enumerate_near", None)
    found = minimise_core(program, relaxation, gap=0.05, time_limit_s=60)
    assert found.status == "optimal"
    assert best.value - 1e-9 <= found.value <= best.value * 1.06
    assert found.value - found.bound <= 0.05 * found.value


@pytest.mark.parametrize("share", [1.001, 0.999])
def test_enumeration_finds_what_is_within_its_width_and_nothing_else(share: float) -> None:
    program = random_program(7, 12, 6, 2)
    relaxation, best = relax(program), minimise(program, gap=1e-9, time_limit_s=60)
    found = enumerate_near(program, relaxation, share * (best.value - relaxation.bound), 10**6)
    assert found.complete
    assert (found.positions is not None) == (share > 1)
    few = enumerate_near(program, relaxation, 50 * (best.value - relaxation.bound), 1)
    assert not few.complete


CP_SAT = Path(__file__).parents[2] / "benchmarks" / "cp_sat.py"


@pytest.mark.parametrize(("seed", "layers", "rows"), [(0, 32, 2), (1, 32, 4), (2, 80, 2)])
def test_equal_to_cp_sat(seed: int, layers: int, rows: int) -> None:
    """In a process of its own: OR-Tools carries another HiGHS, and the two cannot be in one."""
    if subprocess.run([sys.executable, "-c", "import ortools"], check=False, capture_output=True).returncode:
        pytest.skip("needs ortools")
    program = random_program(seed, layers, 12, rows)
    values = {
        "num_layers": program.num_layers,
        "layers": program.layers.tolist(),
        "objective": program.objective.tolist(),
        "rows": [(row.terms.tolist(), row.limit) for row in program.rows],
        "gap": 1e-7,
        "limit_s": 60.0,
    }
    answer = subprocess.run(
        [sys.executable, str(CP_SAT)], input=json.dumps(values), capture_output=True, text=True, check=True
    )
    status, chosen, _ = json.loads(answer.stdout)
    found = minimise_core(program, relax(program), gap=1e-7, time_limit_s=60)
    assert (found.status, status) == ("optimal", "OPTIMAL")
    assert found.value == pytest.approx(program.objective[chosen].sum(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PuLP's own
@pytest.mark.parametrize(("seed", "layers", "rows"), [(0, 32, 2), (1, 32, 4), (2, 80, 2)])
def test_equal_to_cbc(seed: int, layers: int, rows: int) -> None:
    pulp = pytest.importorskip("pulp")
    program = random_program(seed, layers, 12, rows)
    other = pulp.LpProblem("search", pulp.LpMinimize)
    x = [pulp.LpVariable(f"x{place}", cat="Binary") for place in range(len(program.layers))]
    other += pulp.lpDot(program.objective.tolist(), x)
    for layer in range(program.num_layers):
        other += pulp.lpSum(x[place] for place in np.flatnonzero(program.layers == layer)) == 1
    for row in program.rows:
        other += pulp.lpDot(row.terms.tolist(), x) <= row.limit
    other.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=1e-9))
    found = minimise_core(program, relax(program), gap=1e-7, time_limit_s=60)
    assert (found.status, pulp.LpStatus[other.status]) == ("optimal", "Optimal")
    assert found.value == pytest.approx(pulp.value(other.objective), rel=1e-6)
