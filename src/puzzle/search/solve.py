"""From tables and a target to the solution, or to the reason why there is none."""

from dataclasses import replace

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.search.bounds import QUANTITIES, resolve_bounds
from puzzle.search.exact import Instance, best_architecture
from puzzle.search.explain import explain


def solve(scores: ScoreTable, costs: CostTable, target: TargetSettings, settings: SearchSettings) -> Solution:
    """The architecture with the lowest summed score that meets `target` at one of the table's batch sizes.

    Raises:
        PuzzleError: the target is empty or cannot be met, with the range that can be reached.
    """
    instance = Instance.of(scores, costs, settings.score)
    bounds = resolve_bounds(target, instance.parent, settings.margin)
    if not bounds.given():
        settable = ", ".join(quantity.setting for quantity in QUANTITIES.values())
        raise PuzzleError(f"target: nothing is set; set at least one of {settable}, for example `throughput: 2x`")
    solution = best_architecture(instance, bounds, settings)
    if solution is None:
        raise explain(instance, target, bounds, settings)
    return replace(solution, asked=resolve_bounds(target, instance.parent))
