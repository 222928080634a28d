"""Parents: a family's configuration as the model's, and checkpoints on disk."""

from puzzle.parents.checkpoint import open_checkpoint as open_checkpoint
from puzzle.parents.parent import Parent as Parent
from puzzle.parents.parent import open_parent as open_parent
from puzzle.parents.parent import read_config as read_config
