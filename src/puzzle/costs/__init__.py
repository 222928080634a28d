"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

from puzzle.costs.compare import time_architectures, time_checkpoints
from puzzle.costs.engine import Engine, Sample, Times
from puzzle.costs.memory import fixed_memory, subblock_memory
from puzzle.costs.stage import ENGINES, measure_costs

__all__ = [
    "ENGINES",
    "Engine",
    "Sample",
    "Times",
    "fixed_memory",
    "measure_costs",
    "subblock_memory",
    "time_architectures",
    "time_checkpoints",
]
