"""The architecture search: one block a layer, lowest summed score within the target's bounds (paper section 2.3)."""

from puzzle.search.baselines import BASELINES, Evaluator, solve_baseline
from puzzle.search.bounds import evaluate_blocks, excesses, parent_totals, resolve_bounds
from puzzle.search.constraints import check_spans
from puzzle.search.frontier import frontier
from puzzle.search.solve import Further, check_asked, pool, solve, with_asked
from puzzle.search.stage import search
from puzzle.search.table_file import read_table, to_table_file

__all__ = [
    "BASELINES",
    "Evaluator",
    "Further",
    "check_asked",
    "check_spans",
    "evaluate_blocks",
    "excesses",
    "frontier",
    "parent_totals",
    "pool",
    "read_table",
    "resolve_bounds",
    "search",
    "solve",
    "solve_baseline",
    "to_table_file",
    "with_asked",
]
