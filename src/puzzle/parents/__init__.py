"""Parents: family adapters and checkpoints on disk."""

from puzzle.modeling import finish
from puzzle.parents.base import FamilyAdapter
from puzzle.parents.parent import ADAPTERS, Parent, open_parent

__all__ = ["ADAPTERS", "FamilyAdapter", "Parent", "finish", "open_parent"]
