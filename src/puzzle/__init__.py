"""Puzzle: from a trained language model, a machine, an engine and a target, a child that is cheaper to serve.

Names are imported when they are first used, so that `import puzzle` takes no time. It also makes transformers know the
child's model class: at once if transformers is imported already, and otherwise as soon as it is.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # isort: off
    from puzzle.artefacts import CostTable as CostTable, ScoreTable as ScoreTable, Solution as Solution
    from puzzle.child import Child as Child, realise as realise, refine as refine
    from puzzle.costs import measure_costs as measure_costs, time_models as time_models
    from puzzle.data import TokenData as TokenData, prepare_data as prepare_data
    from puzzle.distill import distil as distil
    from puzzle.errors import PuzzleError as PuzzleError
    from puzzle.evaluate import measure_speed as measure_speed
    from puzzle.export import export_hf as export_hf
    from puzzle.library import Library as Library, build_library as build_library, calibrate as calibrate
    from puzzle.modeling import PuzzleConfig as PuzzleConfig, PuzzleForCausalLM as PuzzleForCausalLM
    from puzzle.parents import Parent as Parent, open_parent as open_parent
    from puzzle.pipeline import Pipeline as Pipeline, run_stage as run_stage
    from puzzle.recipe import Recipe as Recipe
    from puzzle.runs import Run as Run, create_folder as create_folder, open_run as open_run
    from puzzle.scores import score as score, true_scores as true_scores
    from puzzle.search.solve import frontier as frontier, solve as solve
    from puzzle.search.tables import Tables as Tables
    from puzzle.variants import Architecture as Architecture, Space as Space, derive_space as derive_space


@cache
def _homes(file: str) -> dict[str, str]:
    """The module of every name of a package: what it imports for type checkers is the only list of them."""
    imports = (node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.ImportFrom))
    return {each.name: str(node.module) for node in imports for each in node.names if each.asname}


def lazily(package: str, file: str) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports its names when they are first used."""

    def get(name: str) -> Any:
        if name in _homes(file):
            return getattr(import_module(_homes(file)[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get


__getattr__ = lazily(__name__, __file__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes(__file__)})


class _Registration(MetaPathFinder):
    """Has `puzzle.modeling`, which registers the model class, imported right after transformers itself."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec: Any = PathFinder.find_spec(name, path, target) if name == "transformers" else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), import_module("puzzle.modeling"))
        return spec


sys.meta_path.insert(0, _Registration())
if "transformers" in sys.modules:
    import_module("puzzle.modeling")
