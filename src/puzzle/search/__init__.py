"""The architecture search: one block a layer, lowest summed score within the target's bounds (paper section 2.3)."""

from puzzle.search.baselines import BASELINES as BASELINES
from puzzle.search.baselines import solve_baseline as solve_baseline
from puzzle.search.constraints import check_asked as check_asked
from puzzle.search.constraints import check_spans as check_spans
from puzzle.search.solve import frontier as frontier
from puzzle.search.solve import pool as pool
from puzzle.search.solve import solve as solve
from puzzle.search.stage import Met as Met
from puzzle.search.stage import correct as correct
from puzzle.search.stage import first_met as first_met
from puzzle.search.stage import search as search
from puzzle.search.stage import until_met as until_met
from puzzle.search.table_file import read_table as read_table
from puzzle.search.table_file import to_table_file as to_table_file
from puzzle.search.tables import Demand as Demand
from puzzle.search.tables import Tables as Tables
from puzzle.search.uniform import space_of as space_of
from puzzle.search.uniform import uniform_solution as uniform_solution
