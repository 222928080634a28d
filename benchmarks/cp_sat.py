"""One program by CP-SAT, in a process of its own: OR-Tools carries another HiGHS, and the two cannot be in one.

    python benchmarks/cp_sat.py < program.json

Read: `num_layers`, `layers` (of each choice), `objective`, `rows` as pairs of terms and an upper limit, `gap`,
`limit_s` of CPU time. Printed: status, the choices taken, CPU seconds of one thread, without what it takes to write
the program down. Terms of rows and objective are rounded to multiples of 2**-30, since CP-SAT knows whole numbers
only; an objective of floats it rounds more coarsely itself (of 200 points of a frontier one was then 2e-5 too high).
"""

import json
import sys
import threading
import time
from typing import Any

from ortools.sat.python import cp_model

SCALE = 2**30


def solve(program: dict[str, Any]) -> tuple[str, list[int], float]:
    model = cp_model.CpModel()
    x = [model.new_bool_var(str(place)) for place in range(len(program["layers"]))]
    for layer in range(program["num_layers"]):
        model.add_exactly_one(x[place] for place, own in enumerate(program["layers"]) if own == layer)

    def total(terms: list[float]) -> Any:
        return cp_model.LinearExpr.weighted_sum(x, [round(term * SCALE) for term in terms])

    for terms, limit in program["rows"]:
        model.add(total(terms) <= round(limit * SCALE))
    model.minimize(total(program["objective"]))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.relative_gap_limit = program["gap"]
    before = time.process_time()

    def stop() -> None:
        while time.process_time() - before < program["limit_s"]:
            time.sleep(0.05)
        solver.stop_search()

    threading.Thread(target=stop, daemon=True).start()  # CP-SAT's own limit is on elapsed time
    status = solver.solve(model)
    seconds = time.process_time() - before
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return solver.status_name(status), [i for i in range(len(x)) if solver.value(x[i])] if found else [], seconds


if __name__ == "__main__":
    print(json.dumps(solve(json.load(sys.stdin))))
