"""The space after a look at the closed forms: what is hopeless from the start is not trained."""

from dataclasses import asdict, dataclass

from puzzle.library.groups import parent_subblock
from puzzle.library.statistics import Statistics
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, write_json
from puzzle.variants import SUBBLOCKS, ParentSubblock, Space, Start, Subblock, expected_losses, prune_space


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The loss that a variant starts with, by the calibration moments alone; None where these do not tell."""

    layer: int
    subblock: Subblock
    variant: str
    loss: float | None


def promising_space(run: Run, parent: Parent, statistics: Statistics, space: Space) -> Space:
    """`space` without the variants that start with `space.prune` times the error of a smaller one.

    No forward pass is made. The expected losses are kept as `expected.json`.
    """
    ratio = run.recipe.space.prune
    if ratio is None:
        return space
    names = [[variant.name for subblock in SUBBLOCKS for variant in layer.subblock(subblock)] for layer in space.layers]
    library = run.recipe.library
    # By closed forms whatever the library starts with: the paper's linear maps start worse than nothing at all.
    start = Start(kv_heads=library.kv_heads, channels=library.channels)
    settings = {"space": names, "kv_heads": start.kv_heads, "channels": start.channels}
    stage = run.stage("space", version=1, settings=settings, inputs=(parent.address, statistics.address))
    file = stage.path / "expected.json"
    if not stage.done:
        expected = _expectations(run, parent, statistics, space, start)
        write_json(file, [asdict(expectation) for expectation in expected])
        stage.commit()
    rows = [Expectation(**row) for row in read_json(file)]
    losses = {(row.layer, row.subblock, row.variant): row.loss for row in rows}
    pruned = prune_space(space, losses, parent.config, ratio)
    before, after = (sum(len(layer.attention) + len(layer.ffn) for layer in each.layers) for each in (space, pruned))
    if before != after:
        run.log(
            f"space: {before - after} of {before} variants start {ratio:g} times worse than a smaller one; left out"
        )
    return pruned


def _expectations(run: Run, parent: Parent, statistics: Statistics, space: Space, start: Start) -> list[Expectation]:
    def subblock(layer: int, subblock: Subblock) -> ParentSubblock:
        return parent_subblock(parent, statistics, start, layer, subblock, run.device)

    losses = expected_losses(subblock, space)
    return [
        Expectation(layer=layer, subblock=subblock, variant=name, loss=loss)
        for (layer, subblock, name), loss in losses.items()
    ]
