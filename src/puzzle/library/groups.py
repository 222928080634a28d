"""What is trained for a space: the groups of variants that share a student, and how each student is made."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from puzzle.library.bld import Group
from puzzle.library.coupled import CoupledStudent
from puzzle.library.elastic import ElasticStudent
from puzzle.library.statistics import Statistics
from puzzle.library.students import Student, SubblockStudent
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.variants import (
    SUBBLOCKS,
    BlockVariant,
    GatedFFN,
    ParentSubblock,
    Space,
    Start,
    State,
    Subblock,
    Variant,
    num_params,
    split_state,
)


def parent_subblock(
    parent: Parent, statistics: Statistics, start: Start, layer: int, subblock: Subblock, device: torch.device
) -> ParentSubblock:
    """What the variants of one half of one layer start from, on the device where closed forms are solved."""
    state, moments = split_state(parent.layer_state(layer), subblock), statistics.subblock(layer, subblock)
    return ParentSubblock(
        config=parent.config,
        variant=parent.architecture.blocks[layer].subblock(subblock),
        state={name: value.to(device) for name, value in state.items()},
        statistics={name: value.to(device) for name, value in moments.items()},
        start=start,
    )


def subblock_groups(run: Run, parent: Parent, statistics: Statistics, space: Space) -> list[Group]:
    """Every variant beside the parent's own, each alone; if elastic, all FFN widths of a layer together."""
    settings = run.recipe.library
    start = Start(method=settings.start, kv_heads=settings.kv_heads, channels=settings.channels)

    @lru_cache(maxsize=1)
    def own(layer: int, subblock: Subblock) -> ParentSubblock:
        """Shared by the groups of a subblock, which come one after another: so its channels are ranked once."""
        return parent_subblock(parent, statistics, start, layer, subblock, run.device)

    groups = []
    for layer, layer_space in enumerate(space.layers):
        for subblock in SUBBLOCKS:
            for variants in _together(layer_space.subblock(subblock)[1:], elastic=settings.ffn == "elastic"):
                build = partial(_subblock_student, run, own, statistics, layer, variants)
                params = sum(num_params(variant, parent.config) for variant in variants)
                groups.append(Group(layer, subblock, tuple(variant.name for variant in variants), params, build))
    return groups


def _together(variants: Sequence[Variant], *, elastic: bool) -> list[list[Variant]]:
    widths: list[Variant] = [variant for variant in variants if elastic and isinstance(variant, GatedFFN)]
    return [[variant] for variant in variants if variant not in widths] + ([widths] if widths else [])


def _subblock_student(
    run: Run,
    own: Callable[[int, Subblock], ParentSubblock],
    statistics: Statistics,
    layer: int,
    variants: Sequence[Variant],
) -> Student:
    settings, first = run.recipe.library, variants[0]
    parent = own(layer, first.subblock)
    of_block = settings.loss == "block"
    power = float(statistics.layer(layer)["block_power"] if of_block else parent.statistics["output_power"])
    starts = {variant.name: variant.initialise(parent) for variant in variants}
    if settings.ffn == "elastic" and isinstance(first, GatedFFN):
        widths = [variant for variant in variants if isinstance(variant, GatedFFN)]
        return ElasticStudent(layer, widths, parent.config, starts, power, run.device)
    solved = first.closed_form and settings.start == "closed_form" and not of_block
    state = starts[first.name]
    return SubblockStudent(
        layer, first, parent.config, state, power, run.device, trained=not solved, target=settings.loss
    )


def block_groups(
    run: Run,
    parent: Parent,
    statistics: Statistics,
    space: Space,
    state: Callable[[int, BlockVariant], State],
) -> list[Group]:
    """Every composed block but the parent's own and those without weights, each alone.

    Args:
        state: gives the weights that a block of a layer starts with.
    """

    def build(layer: int, block: BlockVariant) -> Student:
        loss = run.recipe.library.loss
        power = statistics.layer(layer)["block_power" if loss == "block" else "block_contribution_power"]
        start = state(layer, block)
        return CoupledStudent(layer, block, parent.config, start, float(power), run.device, target=loss)

    groups = []
    for layer, layer_space in enumerate(space.layers):
        for block in layer_space.blocks()[1:]:
            params = num_params(block.attention, parent.config) + num_params(block.ffn, parent.config)
            if params:
                groups.append(Group(layer, "block", (block.name,), params, partial(build, layer, block)))
    return groups
