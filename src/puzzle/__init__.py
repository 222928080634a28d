"""Puzzle: from a trained language model, a machine, an engine and a target, a child that is cheaper to serve.

Names are imported when they are first used, so that `import puzzle` takes no time. It also makes transformers know the
child's model class: at once if transformers is imported already, and otherwise as soon as it is.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puzzle.artefacts import Bounds, Cost, CostTable, LibraryIndex, Scenario, ScoreTable, Solution, Totals
    from puzzle.child.realise import Child, realise  # of the module, or mypy takes the name for it
    from puzzle.child.refine import refine
    from puzzle.costs import measure_costs, time_models
    from puzzle.data import TokenData, prepare_data
    from puzzle.distill import distil
    from puzzle.errors import PuzzleError
    from puzzle.evaluate import Quality, measure_speed
    from puzzle.export import export_hf
    from puzzle.library import Library, Statistics, build_library, calibrate
    from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
    from puzzle.parents import Parent, open_parent
    from puzzle.pipeline import Pipeline, run_stage
    from puzzle.recipe import Recipe
    from puzzle.runs import Run, create_folder, open_run
    from puzzle.scores import TrueScore, score
    from puzzle.search.solve import frontier, solve
    from puzzle.search.tables import Tables
    from puzzle.variants import Architecture, BlockVariant, Space, derive_space

# fmt: off
__all__ = [
    "Architecture", "BlockVariant", "Bounds", "Child", "Cost", "CostTable", "Library", "LibraryIndex", "Parent",
    "Pipeline", "PuzzleConfig", "PuzzleError", "PuzzleForCausalLM", "Quality", "Recipe", "Run", "Scenario",
    "ScoreTable", "Solution", "Space", "Statistics", "Tables", "TokenData", "Totals", "TrueScore", "build_library",
    "calibrate", "create_folder", "derive_space", "distil", "export_hf", "frontier", "measure_costs",
    "measure_speed", "open_parent", "open_run", "prepare_data", "realise", "refine", "run_stage", "score", "solve",
    "time_models",
]
# fmt: on

_HOMES = {
    "artefacts": "Bounds Cost CostTable LibraryIndex Scenario ScoreTable Solution Totals",
    "child": "Child realise refine",
    "costs": "measure_costs time_models",
    "data": "TokenData prepare_data",
    "distill": "distil",
    "errors": "PuzzleError",
    "evaluate": "Quality measure_speed",
    "export": "export_hf",
    "library": "Library Statistics build_library calibrate",
    "modeling": "PuzzleConfig PuzzleForCausalLM",
    "parents": "Parent open_parent",
    "pipeline": "Pipeline run_stage",
    "recipe": "Recipe",
    "runs": "Run create_folder open_run",
    "scores": "TrueScore score",
    "search": "Tables frontier solve",
    "variants": "Architecture BlockVariant Space derive_space",
}


def __getattr__(name: str) -> Any:
    for room, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"puzzle.{room}"), name)
    raise AttributeError(f"module 'puzzle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration(MetaPathFinder):
    """Has `puzzle.modeling`, which registers the model class, imported right after transformers itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # only once
                    sys.meta_path.remove(self)
                    import_module("puzzle.modeling")

            setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010
        return spec


if "transformers" in sys.modules:
    import_module("puzzle.modeling")
else:
    sys.meta_path.insert(0, _Registration())
