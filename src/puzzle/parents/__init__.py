"""Parents: family adapters and checkpoints on disk."""

from puzzle.modeling import finish
from puzzle.parents.base import FamilyAdapter
from puzzle.parents.checkpoint import open_checkpoint
from puzzle.parents.parent import ADAPTERS, Parent, locate, open_parent, read_config
from puzzle.parents.passes import LayerPass, ParentPasses, Texts

__all__ = [
    "ADAPTERS",
    "FamilyAdapter",
    "LayerPass",
    "Parent",
    "ParentPasses",
    "Texts",
    "finish",
    "locate",
    "open_checkpoint",
    "open_parent",
    "read_config",
]
