"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

from puzzle.costs.compare import sample_architectures, time_architectures, time_checkpoints
from puzzle.costs.engine import Engine, Sample, Times, doubt, summarise
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
    "doubt",
    "fitted",
    "fixed_memory",
    "measure_costs",
    "read_machine",
    "sample_architectures",
    "scenario_of",
    "subblock_memory",
    "summarise",
    "time_architectures",
    "time_checkpoints",
]
