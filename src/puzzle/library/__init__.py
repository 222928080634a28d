"""The block library: calibration statistics, starts, BLD, storage."""

from puzzle.library.blocks import LayerBlocks, final_states
from puzzle.library.library import Library, build_library
from puzzle.library.space import narrow_space, promising_space
from puzzle.library.statistics import Statistics, calibrate
from puzzle.library.students import Student, fit, held_out_losses

__all__ = [
    "LayerBlocks",
    "Library",
    "Statistics",
    "Student",
    "build_library",
    "calibrate",
    "final_states",
    "fit",
    "held_out_losses",
    "narrow_space",
    "promising_space",
]
