"""The architecture search: one block a layer, lowest summed score within the target's bounds (paper section 2.3)."""

from puzzle.search.bounds import evaluate_blocks, excesses, parent_totals, resolve_bounds
from puzzle.search.frontier import frontier
from puzzle.search.solve import solve
from puzzle.search.stage import search

__all__ = [
    "evaluate_blocks",
    "excesses",
    "frontier",
    "parent_totals",
    "resolve_bounds",
    "search",
    "solve",
]
