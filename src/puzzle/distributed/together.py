"""One run folder and several processes: rank 0 writes, the others read."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from puzzle.device import choose_device
from puzzle.distributed.group import Group, is_lost_peer, start
from puzzle.errors import PuzzleError, one_line
from puzzle.recipe import Recipe
from puzzle.runs import Run, check_folder, open_run

TOGETHER = ("teacher", "distil")
"""The stages that several processes work on as one."""


@contextmanager
def open_together(path: Path) -> Iterator[Run]:
    """The run in `path` for each process that torchrun started; rank 0 holds its lock.

    All stages before `TOGETHER` must be finished.
    """
    check_folder(path)
    recipe = Recipe.read(path / "recipe.yaml")
    group = start(choose_device(recipe.execution.device))
    with ExitStack() as stack:
        opened: list[Run] = []
        group.first(lambda: opened.append(stack.enter_context(open_run(path))))
        run = opened[0] if group.leads else Run(path, recipe, leads=False)
        stack.enter_context(_silent(group))
        try:
            yield replace(run, only=TOGETHER)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise PuzzleError(
                f"another of the {group.size} processes was lost ({one_line(error)}); torchrun starts all again if "
                "--max-restarts allows, and so does the same command; nothing saved is lost"
            ) from None


def train_on_cluster(run: Run, train: Callable[[Run], object], sequences: int) -> None:
    """Call `train` with the run in several processes of the cluster `run.on`; this process holds the lock.

    Args:
        train: can be pickled, and resumes from its own state.
        sequences: divided evenly among the processes.
    """
    from puzzle.distributed.ray import train_together

    train_together(run, partial(_train, run, train), sequences)


def _train(run: Run, train: Callable[[Run], object]) -> None:
    group = Group.current()
    with _silent(group):
        train(replace(run, on=None, leads=group.leads, only=TOGETHER))


@contextmanager
def _silent(group: Group) -> Iterator[None]:
    """Only rank 0 prints."""
    if group.leads:
        yield
    else:
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            yield
