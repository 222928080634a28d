"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

from puzzle.costs.engine import Engine as Engine
from puzzle.costs.engine import Model as Model
from puzzle.costs.engine import Sample as Sample
from puzzle.costs.process_engines import check_llama_cpp as check_llama_cpp
from puzzle.costs.roofline import Machine as Machine
from puzzle.costs.roofline import read_machine as read_machine
from puzzle.costs.stage import is_measured as is_measured
from puzzle.costs.stage import measure_costs as measure_costs
from puzzle.costs.stage import scenario_of as scenario_of
from puzzle.costs.table import COPIES as COPIES
from puzzle.costs.table import parent_totals as parent_totals
from puzzle.costs.timing import ENGINES as ENGINES
from puzzle.costs.timing import relative_standard_error as relative_standard_error
from puzzle.costs.timing import requests_ms as requests_ms
from puzzle.costs.timing import summarise as summarise
from puzzle.costs.timing import time_models as time_models
