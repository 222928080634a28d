"""Pruning of the space before training: variants whose start is much worse than that of a smaller one."""

from collections.abc import Callable, Mapping

from puzzle.modeling import PuzzleConfig
from puzzle.variants.base import SUBBLOCKS, ParentSubblock, Subblock, Variant
from puzzle.variants.space import LayerSpace, Space

ExpectedLosses = Mapping[tuple[int, Subblock, str], float | None]
"""By layer, subblock and name of the variant."""


def expected_losses(
    read: Callable[[int, Subblock], ParentSubblock], space: Space
) -> dict[tuple[int, Subblock, str], float | None]:
    """The expected loss of every variant's start on the calibration text; None where its moments do not suffice.

    Args:
        read: reads a subblock of a layer of the parent; one is held at a time.
    """
    losses: dict[tuple[int, Subblock, str], float | None] = {}
    for index, layer in enumerate(space.layers):
        for subblock in SUBBLOCKS:
            parent = read(index, subblock)
            for variant in layer.subblock(subblock):
                losses[index, subblock, variant.name] = variant.expected_loss(parent, variant.initialise(parent))
    return losses


def prune_space(space: Space, losses: ExpectedLosses, config: PuzzleConfig, ratio: float) -> Space:
    """`space` without the variants that start with more than `ratio` times the loss of a smaller one of their subblock.

    Smaller means: no more parameters and no larger KV cache; so `none`, which has neither, stays. So do the parent's
    own and what has no expected loss.
    """

    def kept(layer: int, subblock: Subblock) -> tuple[Variant, ...]:
        own, *others = space.layers[layer].subblock(subblock)
        sizes = {variant: _sizes(variant, config) for variant in (own, *others)}
        known = {variant: losses[layer, subblock, variant.name] for variant in (own, *others)}

        def hopeless(variant: Variant) -> bool:
            loss = known[variant]
            return loss is not None and any(
                other_loss is not None
                and ratio * other_loss < loss
                and all(a <= b for a, b in zip(sizes[other], sizes[variant], strict=True))
                for other, other_loss in known.items()
            )

        return (own, *(variant for variant in others if not hopeless(variant)))

    layers = range(len(space.layers))
    return Space(tuple(LayerSpace(*(kept(layer, subblock) for subblock in SUBBLOCKS)) for layer in layers))


def _sizes(variant: Variant, config: PuzzleConfig) -> tuple[int, int]:
    """Parameters, and the KV cache of the longest sequence."""
    return variant.num_params(config), variant.kv_values(config, config.max_position_embeddings)
