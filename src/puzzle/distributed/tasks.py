"""A stage's work on layers as independent tasks: one task for all layers here, or one a worker on a Ray cluster.

A task is a range of layers. Its results are files of its own in the run folder, so it can be started again anywhere and
resumes from them. Only the process of the command holds the run folder's lock and marks stages as finished.
"""

import shutil
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from puzzle.runs import Run, StageFolder

LayerTask = Callable[[range, Path], object]
"""Processes a range of layers. The folder is for resuming; it is deleted when all tasks are done."""


def for_layers(run: Run, stage: StageFolder, task: LayerTask, costs: Sequence[float]) -> None:
    """Call `task` once with all layers, or on a cluster with a range for each worker, in parallel.

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
