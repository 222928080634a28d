"""The block library: calibration statistics, BLD, storage."""

from puzzle.library.bld import Library, build_library
from puzzle.library.statistics import Statistics, calibrate

__all__ = ["Library", "Statistics", "build_library", "calibrate"]
