"""Quality against the parent, speed on the engine, and the final table's rows."""

from puzzle.evaluate.quality import Quality, evaluate
from puzzle.evaluate.speed import measure_speed
from puzzle.evaluate.table import table_row

__all__ = ["Quality", "evaluate", "measure_speed", "table_row"]
