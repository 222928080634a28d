"""The architecture search: one block a layer, lowest summed score within the target's bounds (paper section 2.3).

What works on tables needs no torch, and the rest is imported when it is first used.
"""

from typing import TYPE_CHECKING

from puzzle import lazily
from puzzle.search.baselines import BASELINES as BASELINES
from puzzle.search.baselines import solve_baseline as solve_baseline
from puzzle.search.constraints import check_asked as check_asked
from puzzle.search.constraints import check_spans as check_spans
from puzzle.search.solve import frontier as frontier
from puzzle.search.solve import pool as pool
from puzzle.search.solve import solve as solve
from puzzle.search.table_file import read_table as read_table
from puzzle.search.table_file import to_table_file as to_table_file
from puzzle.search.tables import Demand as Demand
from puzzle.search.tables import Tables as Tables
from puzzle.search.tables import resolve_bounds as resolve_bounds

if TYPE_CHECKING:  # isort: off
    from puzzle.search.stage import Met as Met, correct as correct, first_met as first_met
    from puzzle.search.stage import search as search, until_met as until_met
    from puzzle.search.uniform import space_of as space_of, uniform_solution as uniform_solution

__getattr__ = lazily(__name__, __file__)
