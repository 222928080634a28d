"""Replace-1-block scores."""

from puzzle.scores.replace_one import score
from puzzle.scores.suffix import METRICS, per_sequence

__all__ = ["METRICS", "per_sequence", "score"]
