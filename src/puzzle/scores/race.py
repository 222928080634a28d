"""The race: blocks that are larger and clearly worse than another of their layer stop after the first round.

No solution would hold such a block: the other is better in score and in no size worse. Scores of the same text are
compared pairwise, which resolves differences a few times smaller than the scores' own standard errors do.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from puzzle.modeling import PuzzleConfig
from puzzle.variants import BlockVariant, Variant, num_params

_FEWEST = 4
"""Sequences of the first round: fewer say nothing of their own spread."""
_STANDARD_ERRORS = 3.0
Sizes = tuple[int, int, int]
"""Parameters, and KV values of a short and of a long sequence."""


def rounds(share: float | None, sequences: int) -> tuple[int, ...]:
    """Sequences of each round: one round where there is no race, or too little text for one."""
    first = sequences if share is None else max(_FEWEST, math.ceil(share * sequences))
    return (first, sequences - first) if sequences >= 2 * _FEWEST and first < sequences else (sequences,)


def survivors(kl: Mapping[BlockVariant, Tensor], config: PuzzleConfig) -> list[BlockVariant]:
    """The blocks that go on.

    Args:
        kl: per sequence of the first round, [n], of every block but the parent's own, which is the largest.
    """
    finite = {block: values for block, values in kl.items() if values.isfinite().all()}
    subblocks = {variant for block in finite for variant in (block.attention, block.ffn)}
    half_sizes = {variant: _sizes(variant, config) for variant in subblocks}
    sizes = {block: _sum(half_sizes[block.attention], half_sizes[block.ffn]) for block in finite}
    return [
        block
        for block, values in finite.items()
        if not any(
            _smaller(sizes[other], sizes[block]) and _clearly_better(other_values, values)
            for other, other_values in finite.items()
        )
    ]


def _sizes(variant: Variant, config: PuzzleConfig) -> Sizes:
    """A window binds long sequences alone, so that what is smaller at both ends is so at every length."""
    short, long = (variant.kv_values(config, tokens) for tokens in (1, config.max_position_embeddings))
    return num_params(variant, config), short, long


def _sum(one: Sizes, other: Sizes) -> Sizes:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _smaller(one: Sizes, other: Sizes) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _clearly_better(one: Tensor, other: Tensor) -> bool:
    difference = other - one
    return bool(difference.mean() > _STANDARD_ERRORS * difference.std() / math.sqrt(len(difference)))
