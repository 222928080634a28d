"""The typed artefacts in which the stages meet. Plain data: no torch, blocks by name."""

from puzzle.artefacts.artefact import Artefact as Artefact
from puzzle.artefacts.artefact import dump_rows as dump_rows
from puzzle.artefacts.costs import Cost as Cost
from puzzle.artefacts.costs import CostRow as CostRow
from puzzle.artefacts.costs import CostTable as CostTable
from puzzle.artefacts.costs import Scenario as Scenario
from puzzle.artefacts.costs import Totals as Totals
from puzzle.artefacts.scores import LibraryIndex as LibraryIndex
from puzzle.artefacts.scores import LibraryRow as LibraryRow
from puzzle.artefacts.scores import ScoreName as ScoreName
from puzzle.artefacts.scores import ScoreRow as ScoreRow
from puzzle.artefacts.scores import ScoreTable as ScoreTable
from puzzle.artefacts.solution import Bounds as Bounds
from puzzle.artefacts.solution import Correction as Correction
from puzzle.artefacts.solution import Evaluated as Evaluated
from puzzle.artefacts.solution import Proof as Proof
from puzzle.artefacts.solution import Serving as Serving
from puzzle.artefacts.solution import Solution as Solution
from puzzle.artefacts.solution import WholeScore as WholeScore
