"""The one training loop: for the students of BLD, for refinement, for GKD, for the demo's parent.

Killed at any moment, a training that is started again ends with the weights of one left alone (law 11):

FOLDER/training000320/    parameters, moments, the best weights so far, after 320 steps
FOLDER/curve.json         held-out points, where there are any
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puzzle.device import steps_between_looks
from puzzle.distributed.group import Group
from puzzle.distributed.state import TrainingState as State
from puzzle.distributed.state import remove_states, saved_names
from puzzle.distributed.stop import stop_when_asked
from puzzle.runs import Progress, read_json, read_tensors, write_json, write_tensors

__all__ = ["Part", "Point", "Trained", "adamw", "remove_states", "saved_names", "schedule", "train"]

_BETAS = (0.9, 0.95)
"""Of AdamW, as usual for language models (paper gives none; Puzzletron's default)."""

_MAX_SKIPS = 10
"""Steps in a row without a finite gradient, after which a part counts as diverged."""

_CRITERION = "validation_kl"
"""The figure of a held-out point that is to be low."""

Point = dict[str, float]
"""Figures on held-out text after a step: `step`, `validation_kl`, ..."""


@dataclass(frozen=True)
class Part:
    """What has a gradient norm of its own: a whole model, or one of many students that share nothing but the text."""

    name: str
    parameters: Mapping[str, Tensor]
    """By names that no other part has."""
    optimizers: Sequence[Optimizer]
    """Made with the highest learning rate; see `adamw`."""


@dataclass(frozen=True)
class Trained:
    """How a training ended."""

    curve: list[Point]
    """Held-out points, the start first; empty without `validate`."""
    best: Mapping[str, Tensor]
    """The parameters at the best of them, on their device; empty without `validate`."""
    diverged: Sequence[str]
    """Names of the parts that stopped, since their gradients were not finite for ten steps."""

    @property
    def best_point(self) -> Point:
        return _best(self.curve)


def train(
    parts: Sequence[Part],
    gradients: Callable[[int], Mapping[str, Tensor]],
    *,
    steps: int,
    warmup: float,
    max_grad_norm: float,
    folder: Path,
    bar: Progress,
    validate: Callable[[int], Point] | None = None,
    num_points: int = 10,
) -> Trained:
    """Train all parts for `steps` steps, from where a training in this folder stood.

    Each step clips every part's gradients by their norm, and leaves a part alone whose gradients are not finite. One
    process or several, each with its share of the text and of every parameter, take the same steps.

    Args:
        gradients: runs the text of a step forward and backward; returns numbers to show beside the bar, on the device.
        warmup: share of the steps; see `schedule`.
        bar: has room for `steps`.
        validate: the point after so many steps; called at the start and `num_points` times.

    Raises:
        KeyboardInterrupt: after all was saved, where any of the processes was asked to stop.
    """
    group = Group.current()
    trained = {name: value for part in parts for name, value in part.parameters.items()}
    best = {f"best.{name}": value.detach().clone() for name, value in trained.items()} if validate else {}
    state = State(folder, {**trained, **best}, [each for part in parts for each in part.optimizers])
    steppers = [_Stepper(part, max_grad_norm) for part in parts]
    first = state.restore()
    bar.advance(first)
    known = group.first(lambda: _read_curve(folder))
    curve = [point for point in known if point["step"] <= first]

    def hold_out(done: int) -> None:
        """A point of the curve; the weights are kept if it is the best."""
        if validate is None or (done % math.ceil(steps / num_points) and done != steps):
            return
        curve.append(validate(done))
        if _best(curve) is curve[-1]:
            for name, value in trained.items():
                best[f"best.{name}"].copy_(value.detach())
        group.first(lambda: write_json(folder / "curve.json", curve))

    if not curve:
        hold_out(0)
    skips = [0.0] * len(parts)
    looked, next_look, looked_at = first, first + 1, time.monotonic()
    with stop_when_asked() as stop:
        for step in range(first, steps):
            shown = gradients(step)
            for stepper in steppers:
                stepper.step(schedule(step, steps=steps, warmup=warmup))
            done = step + 1
            hold_out(done)
            if done >= next_look or done == steps:
                figures = [*shown.values(), *(stepper.most_skips for stepper in steppers)]
                seen = torch.stack([figure.detach().float() for figure in figures]).tolist()
                flags = [stop.asked, group.leads and state.due(), time.monotonic() - looked_at]
                asked, due, seconds = group.sum(torch.tensor(flags)).tolist()
                bar.advance(done - looked, **dict(zip(shown, seen, strict=False)))
                next_look = done + steps_between_looks(seconds / group.size / (done - looked))
                looked, looked_at = done, time.monotonic()
                if asked or due:
                    state.save(done)
                if asked:
                    raise KeyboardInterrupt
                skips = seen[len(shown) :]
                if min(skips) >= _MAX_SKIPS:
                    break
    diverged = [part.name for part, most in zip(parts, skips, strict=True) if most >= _MAX_SKIPS]
    return Trained(curve, {name.removeprefix("best."): value for name, value in best.items()}, diverged)


def schedule(step: int, *, steps: int, warmup: float) -> float:
    """The share of the highest rate: up linearly over the share `warmup` of the steps, then down a cosine to zero."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def adamw(parameters: Iterable[Tensor], learning_rate: float, *, weight_decay: float = 0.0) -> Optimizer:
    """AdamW; matrices decay, vectors do not."""
    every = list(parameters)
    groups = [
        {"params": [value for value in every if value.ndim > 1], "weight_decay": weight_decay},
        {"params": [value for value in every if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], learning_rate, _BETAS, fused=True)


class _Stepper:
    """Takes a part's steps without ever waiting for the device."""

    def __init__(self, part: Part, max_grad_norm: float) -> None:
        self.part, self._max_grad_norm = part, max_grad_norm
        self._skips = self.most_skips = torch.zeros((), device=next(iter(part.parameters.values())).device)
        """Steps in a row without a finite gradient: now, and the most so far."""

    def step(self, rate: float) -> None:
        """A step at this share of the highest rate; none if a gradient is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.part.parameters.values(), self._max_grad_norm)
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = (~whole_norm.isfinite()).float()
        for optimizer in self.part.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.setdefault("initial_lr", group["lr"])
            optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by fused ones, as torch.amp.GradScaler's
            if getattr(optimizer, "_step_supports_amp_scaling", False) or not skipped:  # others wait for the device
                optimizer.step()
            optimizer.zero_grad()
        self._skips = (self._skips + 1) * skipped
        self.most_skips = torch.maximum(self.most_skips, self._skips)


def _best(curve: Sequence[Point]) -> Point:
    return min(curve, key=lambda point: point[_CRITERION])


def _read_curve(folder: Path) -> list[Point]:
    file = folder / "curve.json"
    curve: list[Point] = read_json(file) if file.exists() else []
    return curve


# Until BLD and refinement use `train`:

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
