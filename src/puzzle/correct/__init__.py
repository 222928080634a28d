"""Beyond the additive model: whole architectures compared, and the search corrected by them."""

from puzzle.correct.ranks import kendall_tau, spearman
from puzzle.correct.stage import correct
from puzzle.correct.whole import TrueScore

__all__ = ["TrueScore", "correct", "kendall_tau", "spearman"]
