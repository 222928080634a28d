"""One run folder, opened by several processes: the first locks it and writes, the others read."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

from puzzle.distributed.group import start
from puzzle.errors import PuzzleError, one_line
from puzzle.recipe import Recipe
from puzzle.runs import Run, check_folder, choose_device, open_run


@contextmanager
def open_together(path: Path, stages: tuple[str, ...]) -> Iterator[Run]:
    """The run in `path` for each of the processes that torchrun started.

    Args:
        stages: what they do together; all other stages must be finished.
    """
    check_folder(path)
    recipe = Recipe.read(path / "recipe.yaml")
    group = start(choose_device(recipe.execution.device))
    with ExitStack() as stack:
        opened: list[Run] = []
        group.first(lambda: opened.append(stack.enter_context(open_run(path))))
        run = opened[0] if group.leads else Run(path, recipe, leads=False)
        if not group.leads:
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        try:
            yield replace(run, only=stages)
        except RuntimeError as error:
            if not _is_lost_peer(error):
                raise
            raise PuzzleError(
                f"another of the {group.size} processes was lost ({one_line(error)}); torchrun starts all again if "
                "--max-restarts allows, and so does the same command; nothing saved is lost"
            ) from None


def _is_lost_peer(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/" in str(error)
