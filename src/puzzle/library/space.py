"""The space narrowed: before BLD by what the closed forms tell, after it to what the frontier uses."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from puzzle.library.statistics import Statistics
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, write_json
from puzzle.stages import SPACE
from puzzle.variants import BlockVariant, LayerSpace, Space, Start, expected_losses, prune_space


def promising_space(run: Run, parent: Parent, statistics: Statistics, space: Space) -> Space:
    """`space` without the variants that start with `space.prune` times the error of a smaller one.

    No forward pass is made. The expected losses are kept as `expected.json`.
    """
    ratio, library = run.recipe.space.prune, run.recipe.library
    if ratio is None:
        return space
    # By closed forms whatever the library starts with: the paper's linear maps start worse than nothing at all.
    start = Start(kv_heads=library.kv_heads, channels=library.channels)
    stage = run.open(SPACE, parent=parent, statistics=statistics, space=variant_names(space))
    file = stage.path / "expected.json"
    if not stage.done:
        read = partial(statistics.parent_subblock, parent, start, run.device)
        write_json(file, [[*key, loss] for key, loss in expected_losses(read, space).items()])
        stage.commit()
    losses = {(layer, subblock, variant): loss for layer, subblock, variant, loss in read_json(file)}
    pruned = prune_space(space, losses, parent.config, ratio)
    before, after = (sum(len(layer.attention) + len(layer.ffn) for layer in each.layers) for each in (space, pruned))
    if before != after:
        run.log(
            f"space: {before - after} of {before} variants start {ratio:g} times worse than a smaller one; left out"
        )
    return pruned


def variant_names(space: Space) -> list[list[str]]:
    """Of every layer, for addresses."""
    return [[variant.name for variant in (*layer.attention, *layer.ffn)] for layer in space.layers]


def narrow_space(
    space: Space, solutions: Sequence[Sequence[str]], keep: int, always: Sequence[str] | None = None
) -> Space:
    """Per layer and subblock, the `keep` variants most used by the architectures, and the parent's own (paper F.1.1).

    Args:
        solutions: architectures of a frontier, each one block name a layer, such as `kv2+w512`.
        always: an architecture whose variants stay in any case, so that what it reaches can still be reached.
    """
    layers = []
    for index, layer in enumerate(space.layers):
        uses = Counter(v for solution in solutions for v in BlockVariant.parse(solution[index]).subblocks)
        safe = () if always is None else BlockVariant.parse(always[index]).subblocks
        subblocks = []
        for variants in (layer.attention, layer.ffn):
            ranked = sorted(variants, key=lambda variant: -uses[variant])  # where uses are equal, the first ones first
            kept = (variants[0], *ranked[:keep], *safe)
            subblocks.append(tuple(variant for variant in variants if variant in kept))
        layers.append(LayerSpace(*subblocks))
    return Space(tuple(layers))
