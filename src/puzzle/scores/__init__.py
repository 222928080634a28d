"""Scores of blocks and of whole architectures."""

from puzzle.scores.replace_one import score as score
from puzzle.scores.whole import true_scores as true_scores
