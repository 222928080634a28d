"""The architecture search: one block a layer, lowest summed score within the target's bounds (paper section 2.3)."""

from puzzle.search.baselines import BASELINES, solve_baseline
from puzzle.search.bounds import check_asked, parent_totals, resolve_bounds, violations
from puzzle.search.constraints import check_spans
from puzzle.search.solve import frontier, pool, solve
from puzzle.search.stage import correct, search
from puzzle.search.table_file import read_table, to_table_file
from puzzle.search.tables import Tables
from puzzle.search.uniform import space_of, uniform_solution
from puzzle.search.until_met import Met, first_met, until_met

__all__ = [
    "BASELINES",
    "Met",
    "Tables",
    "check_asked",
    "check_spans",
    "correct",
    "first_met",
    "frontier",
    "parent_totals",
    "pool",
    "read_table",
    "resolve_bounds",
    "search",
    "solve",
    "solve_baseline",
    "space_of",
    "to_table_file",
    "uniform_solution",
    "until_met",
    "violations",
]
