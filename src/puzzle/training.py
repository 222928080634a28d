"""What BLD and GKD share: the learning-rate schedule, and training state that survives a kill."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from puzzle.runs import read_tensors, write_tensors

CHECKPOINT_INTERVAL_S = 30.0
"""Work lost at most when a training is killed."""

BETAS = (0.9, 0.95)
"""Of AdamW, as usual for language models (paper gives none; Puzzletron's default)."""


def learning_rate(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class TrainingState:
    """Parameters, optimiser moments and the number of steps done, in one safetensors file.

    Written every `CHECKPOINT_INTERVAL_S`; a training that goes on from it ends with the weights of one left alone.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Tensor], *optimizers: Optimizer) -> None:
        self._path = path
        self._parameters = parameters
        self._optimizers = optimizers
        self._last_save = time.monotonic()

    def restore(self) -> int:
        """Put the saved state back, if there is one of all these parameters; returns the number of steps done.

        What was saved of others is left out: of trainings that share only their steps, some may be finished already.
        """
        saved = saved_parameters(self._path)
        if not saved or not self._parameters.keys() <= saved:
            return 0
        tensors = read_tensors(self._path)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors.pop(f"parameter.{name}"))
        groups = {parameter: group for optimizer in self._optimizers for parameter, group in _groups(optimizer)}
        for optimizer in self._optimizers:
            for parameter, _ in _groups(optimizer):
                optimizer.state[parameter] = {}
        for full_name, value in tensors.items():
            key, _, name = full_name.partition(".")
            if key in ("steps", "parameter") or name not in self._parameters:
                continue
            parameter = self._parameters[name]
            # Step counters stay on the CPU but for fused optimisers, whose kernels read them where the weights are.
            moved = key != "step" or groups[parameter].get("fused")
            self._state(parameter)[key] = value.to(parameter.device) if moved else value
        return int(tensors["steps"])

    def save_if_due(self, steps: int) -> None:
        if time.monotonic() - self._last_save >= CHECKPOINT_INTERVAL_S:
            self.save(steps)

    def save(self, steps: int) -> None:
        tensors = {"steps": torch.tensor(steps)}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self._state(parameter).items():
                tensors[f"{key}.{name}"] = value
        write_tensors(self._path, tensors)
        self._last_save = time.monotonic()

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments and step counter; empty of a parameter that was never stepped."""
        return next((optimizer.state[parameter] for optimizer in self._optimizers if parameter in optimizer.state), {})


def saved_parameters(path: Path) -> set[str]:
    """Names of the parameters whose training state is in this file; none if there is no such file."""
    if not path.exists():
        return set()
    try:
        with safe_open(path, framework="pt") as file:
            names = [name.partition(".") for name in file.keys()]
    except SafetensorError:
        read_tensors(path)  # says what to do
        raise
    return {name for kind, _, name in names if kind == "parameter"}


def _groups(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every parameter with the settings of its group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Matrix products in bfloat16 if that is the precision asked for; weights and moments stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """In place where the rate is a tensor, as torchao's must be."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
