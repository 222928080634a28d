"""Parents: family adapters and checkpoints on disk."""

from puzzle.modeling import finish
from puzzle.parents.checkpoint import open_checkpoint
from puzzle.parents.family import check_family, puzzle_config
from puzzle.parents.parent import Parent, locate, open_parent, read_config

__all__ = [
    "Parent",
    "check_family",
    "finish",
    "locate",
    "open_checkpoint",
    "open_parent",
    "puzzle_config",
    "read_config",
]
