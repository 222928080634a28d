"""The typed artefacts in which the stages meet. Plain data: no torch, blocks by name."""

from puzzle.artefacts.costs import Cost, CostRow, CostTable, Scenario, Totals
from puzzle.artefacts.library import LibraryIndex, LibraryRow
from puzzle.artefacts.scores import ScoreName, ScoreRow, ScoreTable
from puzzle.artefacts.solution import Bounds, Proof, Solution

__all__ = [
    "Bounds",
    "Cost",
    "CostRow",
    "CostTable",
    "LibraryIndex",
    "LibraryRow",
    "Proof",
    "Scenario",
    "ScoreName",
    "ScoreRow",
    "ScoreTable",
    "Solution",
    "Totals",
]
