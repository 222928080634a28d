"""The child: put together from the library, refined, saved as a checkpoint."""

from puzzle.child.realise import Child as Child
from puzzle.child.realise import realise as realise
from puzzle.child.realise import swapped_logits as swapped_logits
from puzzle.child.refine import refine as refine
