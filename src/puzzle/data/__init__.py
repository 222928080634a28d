"""Text in, packed token blocks out; resumable and deterministic."""

from puzzle.data.pack import prepare_data
from puzzle.data.sample import sample_text
from puzzle.data.tokens import RANGES, RangeName, TokenData, order

__all__ = ["RANGES", "RangeName", "TokenData", "order", "prepare_data", "sample_text"]
