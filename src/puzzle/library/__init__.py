"""The block library: calibration statistics, starts, BLD, storage."""

from puzzle.library.bld import build_library as build_library
from puzzle.library.library import LayerBlocks as LayerBlocks
from puzzle.library.library import Library as Library
from puzzle.library.library import Names as Names
from puzzle.library.library import final_states as final_states
from puzzle.library.rounding import ROUNDED as ROUNDED
from puzzle.library.rounding import decode as decode
from puzzle.library.rounding import encode as encode
from puzzle.library.rounding import encode_state as encode_state
from puzzle.library.statistics import Statistics as Statistics
from puzzle.library.statistics import calibrate as calibrate
from puzzle.library.students import Student as Student
from puzzle.library.students import fit as fit
from puzzle.library.students import held_out as held_out
from puzzle.library.students import student_texts as student_texts
