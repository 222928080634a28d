"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

from puzzle.costs.compare import time_architectures, time_checkpoints
from puzzle.costs.engine import Engine, Sample, Times
from puzzle.costs.fit import Timed, fitted
from puzzle.costs.memory import fixed_memory, subblock_memory
from puzzle.costs.roofline import Machine, read_machine
from puzzle.costs.stage import ENGINES, measure_costs, scenario_of

__all__ = [
    "ENGINES",
    "Engine",
    "Machine",
    "Sample",
    "Timed",
    "Times",
    "fitted",
    "fixed_memory",
    "measure_costs",
    "read_machine",
    "scenario_of",
    "subblock_memory",
    "time_architectures",
    "time_checkpoints",
]
