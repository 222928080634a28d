"""Training state on disk, written by all processes, each its share; any other number of them can go on from it.

FOLDER/training000320/*.safetensors    parameters, moments and step counters after step 320, from each process a file

Written by `torch.distributed.checkpoint` as safetensors, so that nothing is ever unpickled.
"""

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puzzle.distributed.group import Group

_NAME = "training{}"
_PART = ".part"
"""Ends the name of a folder that is not whole yet."""


class ShardedState:
    """Parameters, optimiser moments and the number of steps done.

    Args:
        parameters: all that is saved, whether an optimiser has it or not; shares of tensors, or whole ones that are the
            same in all processes.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        self._folder, self._parameters, self._optimizers = folder, parameters, optimizers
        self._group = Group.current()
        self._last_save, self._saved_steps = time.monotonic(), 0

    def age(self) -> float:
        """Seconds since it was saved."""
        return time.monotonic() - self._last_save

    def restore(self) -> int:
        """Put the newest saved state back, if there is one; returns the number of steps done."""
        steps = self._group.first(self._newest)
        if not steps:
            return 0
        reader = HuggingFaceStorageReader(str(self._path(steps)))
        stored = reader.read_metadata().state_dict_metadata
        tensors = {key: self._place(key, facts) for key, facts in stored.items()}
        with _quiet():
            load(tensors, storage_reader=reader, no_dist=self._group.size == 1)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {}
        for full_name, value in tensors.items():
            key, _, name = full_name.partition(".")
            if key not in ("steps", "parameter"):
                self._state(self._parameters[name])[key] = value
        self._saved_steps = steps
        return steps

    def save(self, steps: int) -> None:
        """Write it; all processes call this together, and one state is on disk at any time."""
        if steps == self._saved_steps:
            return
        tensors: dict[str, Any] = {"steps": torch.tensor(steps)}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            for key, value in self._state(parameter).items():
                tensors[f"{key}.{name}"] = value
        part = self._path(steps).with_suffix(_PART)
        self._group.first(lambda: shutil.rmtree(part, ignore_errors=True))
        with _quiet():
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            save(tensors, storage_writer=writer, no_dist=self._group.size == 1)
        self._group.first(lambda: self._finish(part, self._path(steps)))
        self._last_save, self._saved_steps = time.monotonic(), steps

    def _finish(self, part: Path, path: Path) -> None:
        _flush(part)
        part.rename(path)
        _flush(self._folder)
        for other in self._folder.glob(_NAME.format("*")):
            if other != path:
                shutil.rmtree(other)

    def _newest(self) -> int:
        found = [path for path in self._folder.glob(_NAME.format("*")) if path.suffix != _PART]
        return max((int(path.name.removeprefix(_NAME.format(""))) for path in found), default=0)

    def _path(self, steps: int) -> Path:
        return self._folder / _NAME.format(f"{steps:06d}")

    def _place(self, full_name: str, stored: Any) -> Tensor:
        """Where a stored tensor is read to: the parameter itself, or memory for a moment, shared out as it is."""
        key, _, name = full_name.partition(".")
        if key == "steps":
            return torch.zeros((), dtype=torch.int64)
        parameter = self._parameters[name].detach()
        if key == "parameter":
            return parameter
        if isinstance(parameter, DTensor) and stored.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=stored.properties.dtype)
        # Step counters stay on the CPU but for fused optimisers, whose kernels read them where the weights are.
        moved = key != "step" or self._is_fused(name)
        return torch.zeros(stored.size, dtype=stored.properties.dtype, device=parameter.device if moved else "cpu")

    def _is_fused(self, name: str) -> bool:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        held = [group for group in groups if any(value is self._parameters[name] for value in group["params"])]
        return bool(held and held[0].get("fused"))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments and step counter; empty of a parameter that was never stepped."""
        return next((optimizer.state[parameter] for optimizer in self._optimizers if parameter in optimizer.state), {})


def remove_states(folder: Path) -> None:
    """Delete what only a training that goes on would need."""
    for path in folder.glob(_NAME.format("*")):
        shutil.rmtree(path)


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
