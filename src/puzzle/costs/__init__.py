"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

from puzzle.costs.engine import Engine, Model, Sample
from puzzle.costs.roofline import Machine, read_machine
from puzzle.costs.stage import measure_costs, scenario_of
from puzzle.costs.table import fixed_memory, subblock_memory
from puzzle.costs.timing import ENGINES, ratio_standard_error, relative_standard_error, summarise, time_models

__all__ = [
    "ENGINES",
    "Engine",
    "Machine",
    "Model",
    "Sample",
    "fixed_memory",
    "measure_costs",
    "ratio_standard_error",
    "read_machine",
    "relative_standard_error",
    "scenario_of",
    "subblock_memory",
    "summarise",
    "time_models",
]
