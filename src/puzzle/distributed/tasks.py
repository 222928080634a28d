"""A stage's work on layers, cut into tasks: here, one process after all layers, or on a Ray cluster.

A task is a range of layers. It knows of no other, what it has finished is in the run folder under an address of its
own, and so it can be begun again anywhere: it goes on from its files. Only the process that was started by the person
holds the run folder's lock and marks stages as finished.
"""

import shutil
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from puzzle.runs import Run, StageFolder

LayerTask = Callable[[range, Path], object]
"""Does a range of layers. The folder is its own, for what a restart goes on from; it is deleted when all are done."""


def for_layers(run: Run, stage: StageFolder, task: LayerTask, costs: Sequence[float]) -> None:
    """Call `task` so that each layer is in one range; on a cluster a range for each of its workers, at the same time.

    Args:
        task: can be pickled, if there is a cluster.
        costs: of each layer, roughly, in any unit: ranges cost about the same.
    """
    if run.on is None:
        task(*_part(stage, range(len(costs))))
    else:
        from puzzle.distributed.ray import Cluster

        cluster = Cluster(run)
        parts = [_part(stage, layers) for layers in split(costs, cluster.workers)]
        cluster.run(stage.name, task, parts)
    for folder in stage.path.glob("part*/"):
        shutil.rmtree(folder)


def split(costs: Sequence[float], parts: int) -> list[range]:
    """Contiguous, non-empty ranges of about the same summed cost: `parts` of them, or fewer."""
    total = sum(costs)
    middles = [before + cost / 2 for before, cost in zip(accumulate(costs, initial=0.0), costs, strict=False)]
    owners = [min(parts - 1, int(parts * middle / total)) if total else 0 for middle in middles]
    first = {owner: owners.index(owner) for owner in owners}
    return [range(start, start + owners.count(owner)) for owner, start in first.items()]


def _part(stage: StageFolder, layers: range) -> tuple[range, Path]:
    folder = stage.path / f"part{layers.start:03d}-{layers.stop:03d}"
    folder.mkdir(exist_ok=True)
    return layers, folder
