"""The child: assembled from the library, refined, saved as a checkpoint."""

from puzzle.child.realise import Child, assemble, realise, swapped_logits
from puzzle.child.refine import refine

__all__ = ["Child", "assemble", "realise", "refine", "swapped_logits"]
