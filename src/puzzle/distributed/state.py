"""Training state on disk, written by all processes, each its share; any other number of them can go on from it.

FOLDER/training000320/*.safetensors    parameters, moments and step counters after step 320, from each process a file

Written by `torch.distributed.checkpoint` as safetensors, so that nothing is ever unpickled.
"""

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError

CHECKPOINT_INTERVAL_S = 30.0
"""Work lost at most when a training is killed, unless saving takes long."""

_PAUSE_PER_SAVE = 20
"""Times that a save took must pass before the next one: saving takes a twentieth of the time at most."""

_ASSUMED_BYTES_PER_S = 5e8
"""Speed of the first save, before one was measured."""

_NAME = "training{}"
_PART = ".part"
"""Ends the name of a folder that is not whole yet."""


class SaveTimer:
    """Says when to save again: every `CHECKPOINT_INTERVAL_S`, or so rarely that it costs a twentieth of the time.

    Args:
        num_bytes: what a save writes.
    """

    def __init__(self, num_bytes: int) -> None:
        self._save_seconds, self._last = num_bytes / _ASSUMED_BYTES_PER_S, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(CHECKPOINT_INTERVAL_S, _PAUSE_PER_SAVE * self._save_seconds)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around each save."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._save_seconds = self._last - began


class TrainingState:
    """Parameters, optimizer moments and the number of steps done.

    Args:
        parameters: all that is saved, whether an optimizer has it or not; shares of tensors, or whole ones that are the
            same in all processes.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
        self._folder, self._parameters, self._group = folder, parameters, Group.current()
        self._owners = {
            parameter: (optimizer, group)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        copies = 1 + 2 * len(self._owners) / max(1, len(parameters))
        self._timer = SaveTimer(int(copies * sum(value.numel() * value.itemsize for value in parameters.values())))
        self._saved_steps = 0

    def due(self) -> bool:
        """Whether to save now, as far as the clock of this process says."""
        return self._timer.due()

    def restore(self) -> int:
        """Load the newest saved state, if it has all of these parameters; returns the number of steps done, or 0.

        It may have others, which are left alone: of students that were trained together some may be finished.

        Raises:
            PuzzleError: it is damaged.
        """
        steps = self._group.first(lambda: _newest(self._folder))
        if not steps:
            return 0
        reader, stored = _read(self._folder, steps)
        if not self._parameters.keys() <= _names(stored):
            return 0
        wanted = {key: facts for key, facts in stored.items() if key.partition(".")[2] in self._parameters}
        tensors = {key: self._place(key, facts) for key, facts in wanted.items()}
        with _quiet(), _explained(self._folder, steps):
            load(tensors, storage_reader=reader, no_dist=self._group.size == 1)
        for parameter, (optimizer, _) in self._owners.items():
            optimizer.state[parameter] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind != "parameter":
                optimizer, _ = self._owners[self._parameters[name]]
                optimizer.state[self._parameters[name]][kind] = value
        self._saved_steps = steps
        return steps

    def save(self, steps: int) -> None:
        """Write it; all processes call this together, and one state is on disk at any time."""
        if steps == self._saved_steps:
            return
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            if parameter in self._owners:
                for kind, value in self._owners[parameter][0].state[parameter].items():
                    tensors[f"{kind}.{name}"] = value
        path = _folder_of(self._folder, steps)
        part = path.with_suffix(_PART)
        self._group.first(lambda: shutil.rmtree(part, ignore_errors=True))
        with self._timer.saving(), _quiet():
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            save(tensors, storage_writer=writer, no_dist=self._group.size == 1)
        self._group.first(lambda: self._finish(part, path))
        self._saved_steps = steps

    def _finish(self, part: Path, path: Path) -> None:
        _flush(part)
        part.rename(path)
        _flush(self._folder)
        for other in self._folder.glob(_NAME.format("*")):
            if other != path:
                shutil.rmtree(other)

    def _place(self, key: str, stored: Any) -> Tensor:
        """Where a stored tensor is read to: the parameter itself, or memory for a moment, shared out as it is."""
        kind, _, name = key.partition(".")
        parameter = self._parameters[name].detach()
        if kind == "parameter":
            return parameter
        if isinstance(parameter, DTensor) and stored.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=stored.properties.dtype)
        # Step counters stay on the CPU but for fused optimizers, whose kernels read them where the weights are.
        moved = kind != "step" or self._owners[self._parameters[name]][1].get("fused")
        return torch.zeros(stored.size, dtype=stored.properties.dtype, device=parameter.device if moved else "cpu")


def saved_names(folder: Path) -> set[str]:
    """Names of the parameters in the newest state that is saved in `folder`; none if there is no state."""
    steps = _newest(folder)
    return _names(_read(folder, steps)[1]) if steps else set()


def remove_states(folder: Path) -> None:
    """Delete what only a training that goes on would need."""
    for path in folder.glob(_NAME.format("*")):
        shutil.rmtree(path)


def _newest(folder: Path) -> int:
    found = [path for path in folder.glob(_NAME.format("*")) if path.suffix != _PART]
    return max((int(path.name.removeprefix(_NAME.format(""))) for path in found), default=0)


def _folder_of(folder: Path, steps: int) -> Path:
    return folder / _NAME.format(f"{steps:06d}")


def _read(folder: Path, steps: int) -> tuple[HuggingFaceStorageReader, dict[str, Any]]:
    """The reader of a saved state, and what is in it."""
    with _explained(folder, steps):
        reader = HuggingFaceStorageReader(str(_folder_of(folder, steps)))
        return reader, dict(reader.read_metadata().state_dict_metadata)


def _names(stored: Mapping[str, Any]) -> set[str]:
    return {key.partition(".")[2] for key in stored if key.startswith("parameter.")}


@contextmanager
def _explained(folder: Path, steps: int) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        path = _folder_of(folder, steps)
        raise PuzzleError(f"{path} is damaged ({error}); delete it, and run the same command again") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
