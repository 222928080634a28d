"""Quality against the parent, and speed on the engine."""

from puzzle.evaluate.quality import Quality, evaluate
from puzzle.evaluate.speed import measure_speed

__all__ = ["Quality", "evaluate", "measure_speed"]
