"""The one training loop: for the students of BLD, for refinement, for GKD, for the demo's parent.

Killed at any moment, a training that is started again ends with the weights of one left alone (law 11):

FOLDER/training000320/    parameters, moments, the best weights so far, after 320 steps
FOLDER/curve.json         held-out points, where there are any
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puzzle.device import steps_between_looks
from puzzle.distributed.group import Group
from puzzle.distributed.state import TrainingState, remove_states, saved_names
from puzzle.distributed.stop import stop_when_asked
from puzzle.runs import Progress, read_json, write_json

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
    state = TrainingState(folder, {**trained, **best}, [each for part in parts for each in part.optimizers])
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
