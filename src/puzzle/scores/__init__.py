"""Replace-1-block scores."""

from puzzle.scores.replace_one import score

__all__ = ["score"]
