"""Curves for people who watch a training: TensorBoard, Weights & Biases."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from puzzle.errors import PuzzleError


class Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show these numbers at this step."""

    def close(self) -> None:
        """Have everything written."""


def open_trackers(
    wanted: Sequence[str] | None, folder: Path, name: str, settings: Mapping[str, object]
) -> list[Tracker]:
    """The trackers asked for; None: TensorBoard if it is installed.

    Args:
        folder: where they keep their files.
        name: of the training; one that goes on is shown as one.

    Raises:
        PuzzleError: a tracker was asked for by name and is not installed.
    """
    makers: dict[str, Callable[[Path, str, Mapping[str, object]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
    }
    trackers: list[Tracker] = []
    for kind in ["tensorboard"] if wanted is None else wanted:
        try:
            trackers.append(makers[kind](folder / kind, name, settings))
        except ImportError:
            if wanted is not None:
                raise PuzzleError(f"distil.log: {kind} is not installed: pip install {kind}, or leave it out") from None
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, object]) -> None:
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, name: str, settings: Mapping[str, object]) -> None:
        wandb = import_module("wandb")
        folder.mkdir(exist_ok=True)
        self._run: Any = wandb.init(project="puzzle", id=name, dir=str(folder), config=dict(settings), resume="allow")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
