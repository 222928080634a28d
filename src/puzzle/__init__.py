"""Puzzle: from a trained language model, a machine, an engine and a target, a child that is cheaper to serve.

Importing it also registers the child's model class with transformers.
"""

import sys
from pathlib import Path


def _is_command_line() -> bool:
    """Whether this is `puzzle` or `python -m puzzle`, and not a program of a user's own."""
    program, given = Path(sys.argv[0]), sys.orig_argv
    if program.name == "-m":
        return "-m" in given and given[given.index("-m") + 1] == "puzzle"
    return program.name == "puzzle" and program.parent == Path(sys.executable).parent


# The command line starts in a fraction of a second and imports what each command needs.
if not _is_command_line():
    from puzzle.artefacts import Bounds, Cost, CostTable, LibraryIndex, Scenario, ScoreTable, Solution, Totals
    from puzzle.child import Child, realise, refine
    from puzzle.correct import TrueScore
    from puzzle.costs import measure_costs, time_checkpoints
    from puzzle.data import TokenData, prepare_data
    from puzzle.distill import distil
    from puzzle.errors import PuzzleError
    from puzzle.evaluate import Quality, evaluate, measure_speed
    from puzzle.export import export_hf
    from puzzle.library import Library, Statistics, build_library, calibrate
    from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
    from puzzle.parents import Parent, open_parent
    from puzzle.pipeline import Pipeline, plan, run_stage
    from puzzle.recipe import Recipe
    from puzzle.runs import Run, create_folder, open_run
    from puzzle.scores import score
    from puzzle.search import frontier, solve
    from puzzle.variants import Architecture, BlockVariant, Space, derive_space

    __all__ = [
        "Architecture",
        "BlockVariant",
        "Bounds",
        "Child",
        "Cost",
        "CostTable",
        "Library",
        "LibraryIndex",
        "Parent",
        "Pipeline",
        "PuzzleConfig",
        "PuzzleError",
        "PuzzleForCausalLM",
        "Quality",
        "Recipe",
        "Run",
        "Scenario",
        "ScoreTable",
        "Solution",
        "Space",
        "Statistics",
        "TokenData",
        "Totals",
        "TrueScore",
        "build_library",
        "calibrate",
        "create_folder",
        "derive_space",
        "distil",
        "evaluate",
        "export_hf",
        "frontier",
        "measure_costs",
        "measure_speed",
        "open_parent",
        "open_run",
        "plan",
        "prepare_data",
        "realise",
        "refine",
        "run_stage",
        "score",
        "solve",
        "time_checkpoints",
    ]
