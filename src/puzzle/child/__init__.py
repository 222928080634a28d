"""The child: assembled from the library, saved as a checkpoint."""

from puzzle.child.realise import Child, assemble, realise, swapped_logits

__all__ = ["Child", "assemble", "realise", "swapped_logits"]
