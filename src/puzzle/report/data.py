"""What a report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from puzzle.artefacts import Correction, CostTable, LibraryIndex, ScoreTable, Solution
from puzzle.costs import Timed

Rows = Mapping[str, Mapping[str, float]]
"""Per model (`parent`, `child_before`, `child`, `uniform`) its numbers by the names of `table.METRICS`."""
Checks = Sequence[Mapping[str, Timed]]
"""What was timed whole after each search, before anything was built: `parent`, `child`, and a `blend` of both."""
Curve = Sequence[Mapping[str, float]]

MODEL_NAMES = {"parent": "parent", "child_before": "before GKD", "child": "child", "uniform": "uniform"}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A finished or unfinished run. What a run does not have yet is left empty, and its part of the page left out."""

    title: str
    recipe_yaml: str
    parent: str
    """The parent's folder or hub name."""
    solution: Solution
    scores: ScoreTable
    costs: CostTable
    library: LibraryIndex
    correction: Correction | None = None
    uniform: Solution | None = None
    frontier: Sequence[Solution] = ()
    rows: Rows = field(default_factory=dict)
    checks: Checks = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """GKD of each model: `tokens`, and `loss` or `validation_kl` or both at each point."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each stage."""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def searched(self) -> Solution:
        """What the search itself found: its proof is of this one."""
        return self.correction.ranked[-1] if self.correction else self.solution

    @property
    def parent_blocks(self) -> tuple[str, ...]:
        """The parent's own block of each layer."""
        return tuple(self.scores.parent_row(layer).block for layer in range(self.scores.num_layers))
