"""Costs of blocks and of whole models: the memory model, the engines' times, and the table made of both."""

# isort: off
from puzzle.costs.engine import Engine as Engine, Model as Model, Sample as Sample
from puzzle.costs.process_engines import check_llama_cpp as check_llama_cpp
from puzzle.costs.roofline import Machine as Machine, read_machine as read_machine
from puzzle.costs.stage import is_measured as is_measured, measure_costs as measure_costs, scenario_of as scenario_of
from puzzle.costs.table import COPIES as COPIES, parent_totals as parent_totals
from puzzle.costs.timing import ENGINES as ENGINES, relative_standard_error as relative_standard_error
from puzzle.costs.timing import requests_ms as requests_ms, summarise as summarise, time_models as time_models
