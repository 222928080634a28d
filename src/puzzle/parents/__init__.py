"""Parents: a family's configuration as the model's, and checkpoints on disk."""

from puzzle.parents.parent import Parent, open_parent, read_config

__all__ = ["Parent", "open_parent", "read_config"]
