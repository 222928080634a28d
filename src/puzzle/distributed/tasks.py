"""The work of a run in several processes: a stage's layers as independent tasks, and one run folder opened by all.

A task is a range of layers: all of them here, or one range for each worker of a Ray cluster. Its results are files in
the run folder, from which it resumes anywhere. Only the command's own process holds the lock and finishes stages.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from puzzle.device import choose_device
from puzzle.distributed.group import is_lost_peer, start
from puzzle.errors import PuzzleError, one_line
from puzzle.runs import Run, StageFolder, check_folder, open_run, read_recipe

TOGETHER = ("teacher", "distil")
"""The stages that several processes work on as one; all before them must be finished."""


def for_layers(run: Run, stage: StageFolder, task: Callable[[range, Path], object], costs: Sequence[float]) -> None:
    """Call `task` once with all layers, or on a cluster with a range for each worker, in parallel.

    Args:
        task: processes a range of layers, with a folder for resuming, which is deleted when all tasks are done. It can
            be pickled, if there is a cluster.
        costs: of each layer, roughly, in any unit: ranges cost about the same.
    """

    def place(layers: range) -> tuple[range, Path]:
        folder = stage.path / f"part{layers.start:03d}-{layers.stop:03d}"
        folder.mkdir(exist_ok=True)
        return layers, folder

    if run.on is None:
        task(*place(range(len(costs))))
    else:
        from puzzle.distributed.ray import Cluster

        cluster = Cluster(run)
        cluster.run(stage.name, task, [place(layers) for layers in split(costs, cluster.workers)])
    for folder in stage.path.glob("part*/"):
        shutil.rmtree(folder)


def split(costs: Sequence[float], parts: int) -> list[range]:
    """Contiguous, non-empty ranges of about the same summed cost: `parts` of them, or fewer."""
    total = sum(costs)
    middles = [before + cost / 2 for before, cost in zip(accumulate(costs, initial=0.0), costs, strict=False)]
    owners = [min(parts - 1, int(parts * middle / total)) if total else 0 for middle in middles]
    first = {owner: owners.index(owner) for owner in owners}
    return [range(start, start + owners.count(owner)) for owner, start in first.items()]


@contextmanager
def open_together(path: Path) -> Iterator[Run]:
    """The run in `path` for each process that torchrun started; rank 0 holds its lock, and alone writes and prints."""
    check_folder(path)
    group = start(choose_device(read_recipe(path).execution.device))
    with ExitStack() as stack:
        opened: list[Run] = []
        group.first(lambda: opened.append(stack.enter_context(open_run(path))))
        run = opened[0] if opened else Run(path, read_recipe(path), leads=False)
        try:
            yield replace(run, only=TOGETHER)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise PuzzleError(
                f"another of the {group.size} processes was lost ({one_line(error)}); torchrun starts all again if "
                "--max-restarts allows, and so does the same command; nothing saved is lost"
            ) from None
