"""Quality against the parent, and speed on the engine."""

from puzzle.evaluate.quality import Quality as Quality
from puzzle.evaluate.quality import evaluate as evaluate
from puzzle.evaluate.speed import bench as bench
from puzzle.evaluate.speed import measure_speed as measure_speed
