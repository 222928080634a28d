"""What two blocks do to the quality together, beyond what each does alone."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PairTerm:
    """The part of the score of two blocks, in two layers, that the sum of their own scores lacks."""

    layers: tuple[int, int]
    """Two different ones."""
    blocks: tuple[str, str]
    """By name, in the order of `layers`."""
    score: float
    """Added to the sum of scores where both are chosen; negative where they are less harmful together."""
