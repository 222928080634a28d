"""The typed artefacts in which the stages meet. Plain data: no torch, blocks by name."""

from puzzle.artefacts.artefact import Artefact, dump_rows
from puzzle.artefacts.correction import Correction, Evaluated, WholeScore
from puzzle.artefacts.costs import Cost, CostRow, CostTable, Scenario, Totals
from puzzle.artefacts.library import LibraryIndex, LibraryRow
from puzzle.artefacts.scores import ScoreName, ScoreRow, ScoreTable
from puzzle.artefacts.solution import Bounds, Proof, Serving, Solution

__all__ = [
    "Artefact",
    "Bounds",
    "Correction",
    "Cost",
    "CostRow",
    "CostTable",
    "Evaluated",
    "LibraryIndex",
    "LibraryRow",
    "Proof",
    "Scenario",
    "ScoreName",
    "ScoreRow",
    "ScoreTable",
    "Serving",
    "Solution",
    "Totals",
    "WholeScore",
    "dump_rows",
]
