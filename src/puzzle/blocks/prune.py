"""A look at the space before anything is trained: what starts much worse than something smaller can be left out."""

from collections.abc import Callable, Mapping

from puzzle.blocks.modules import num_params
from puzzle.blocks.space import LayerSpace, Space
from puzzle.blocks.variants import HALVES, Half, ParentSubblock, Variant
from puzzle.modeling import PuzzleConfig

ExpectedLosses = Mapping[tuple[int, Half, str], float | None]
"""By layer, half and name of the variant."""


def expected_losses(
    subblock: Callable[[int, Half], ParentSubblock], space: Space
) -> dict[tuple[int, Half, str], float | None]:
    """What every variant's start loses on the calibration text, by its moments alone; None where these do not tell.

    Args:
        subblock: reads a half of a layer of the parent; one is held at a time.
    """
    losses: dict[tuple[int, Half, str], float | None] = {}
    for index, layer in enumerate(space.layers):
        for half in HALVES:
            parent = subblock(index, half)
            for variant in layer.half(half):
                losses[index, half, variant.name] = variant.expected_loss(parent, variant.initialise(parent))
    return losses


def prune_space(space: Space, losses: ExpectedLosses, config: PuzzleConfig, ratio: float) -> Space:
    """`space` without the variants that start with more than `ratio` times the loss of a smaller one of their half.

    Smaller means: no more parameters and no larger KV cache; so `none`, which has neither, stays. So do the parent's
    own and what has no expected loss.
    """

    def kept(layer: int, half: Half) -> tuple[Variant, ...]:
        own, *others = space.layers[layer].half(half)
        sizes = {variant: _sizes(variant, config) for variant in (own, *others)}
        known = {variant: losses[layer, half, variant.name] for variant in (own, *others)}

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
    return Space(tuple(LayerSpace(*(kept(layer, half) for half in HALVES)) for layer in layers))


def _sizes(variant: Variant, config: PuzzleConfig) -> tuple[int, int]:
    """Parameters, and the KV cache of the longest sequence."""
    return num_params(variant, config), variant.kv_values(config, config.max_position_embeddings)
