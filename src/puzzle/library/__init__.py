"""The block library: calibration statistics, starts, BLD, storage."""

from puzzle.library.coupled import narrow_space
from puzzle.library.library import Library, build_library
from puzzle.library.space import promising_space
from puzzle.library.statistics import Statistics, calibrate

__all__ = ["Library", "Statistics", "build_library", "calibrate", "narrow_space", "promising_space"]
