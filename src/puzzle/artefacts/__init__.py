"""The typed artefacts in which the stages meet. Plain data: no torch, blocks by name."""

from puzzle.artefacts.artefact import Artefact as Artefact, dump_rows as dump_rows
from puzzle.artefacts.costs import (
    Cost as Cost,
    CostRow as CostRow,
    CostTable as CostTable,
    Scenario as Scenario,
    Totals as Totals,
)
from puzzle.artefacts.scores import (
    LibraryIndex as LibraryIndex,
    LibraryRow as LibraryRow,
    ScoreName as ScoreName,
    ScoreRow as ScoreRow,
    ScoreTable as ScoreTable,
)
from puzzle.artefacts.solution import (
    Bounds as Bounds,
    Correction as Correction,
    Evaluated as Evaluated,
    Proof as Proof,
    Serving as Serving,
    Solution as Solution,
    WholeScore as WholeScore,
)
