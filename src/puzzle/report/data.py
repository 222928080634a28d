"""What a report is made of."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from puzzle.artefacts import CostTable, Proof, ScoreTable, Solution

Rows = Mapping[str, Mapping[str, float]]
"""Per model (`parent`, `child_before`, `child`, `uniform`) its numbers by the keys of `table.METRICS`."""
Curve = Sequence[Mapping[str, float]]

_PACKAGES = ("puzzle-llm", "torch", "transformers", "safetensors", "highspy", "numpy")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A finished or unfinished run. What a run does not have yet stays empty, and its part of the page is left out."""

    title: str
    recipe_yaml: str
    parent: str
    """The parent's folder or hub name."""
    solution: Solution
    scores: ScoreTable
    costs: CostTable
    """With the rows of the uniform child's variants."""
    proof: Proof | None = None
    """Of the lowest sum of scores; the child is another architecture if that is better as a whole."""
    uniform: Solution | None = None
    frontier: Sequence[Solution] = ()
    rows: Rows = field(default_factory=dict)
    checks: Sequence[tuple[str, str, float, float]] = ()
    """What was timed on the engine before anything was built: a model in words, `prefill_ms` or `decode_ms`, predicted
    and measured.
    """
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """GKD of each model: `tokens`, and `validation_kl` at some of the points."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each stage, in the order in which they ran."""
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def parent_blocks(self) -> list[str]:
        """The parent's own block of each layer."""
        return [self.scores.parent_row(layer).block for layer in range(self.scores.num_layers)]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES}
