"""Scores of blocks and of whole architectures."""

from puzzle.scores.replace_one import score
from puzzle.scores.suffix import METRICS, per_sequence
from puzzle.scores.whole import TrueScore

__all__ = ["METRICS", "TrueScore", "per_sequence", "score"]
