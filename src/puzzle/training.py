"""The one training loop: for the students of BLD, for refinement, for GKD, for the demo's parent.

Killed at any moment, a training that is started again ends with the weights of one left alone (law 11):

FOLDER/training000320/    parameters, moments, the best weights so far, after 320 steps
FOLDER/curve.json         held-out points, where there are any
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puzzle.device import steps_between_looks
from puzzle.distributed.group import Group
from puzzle.distributed.state import TrainingState
from puzzle.runs import Progress, read_json, write_json

_MAX_SKIPS = 10
"""Steps in a row without a finite gradient, after which a part counts as diverged."""

Point = dict[str, float]
"""Figures on held-out text after a step: `step`, `validation_kl`, which is to be low, and others."""


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
) -> Trained:
    """Train all parts for `steps` steps, from where a training in this folder stood.

    Each step clips every part's gradients by their norm, and leaves a part alone whose gradients are not finite. One
    process or several, each with its share of the text and of every parameter, take the same steps.

    Args:
        gradients: runs the text of a step forward and backward; returns numbers to show beside the bar, on the device.
        warmup: share of the steps; see `schedule`.
        bar: has room for `steps`.
        validate: the point after so many steps; called at the start and ten times.

    Raises:
        KeyboardInterrupt: after all was saved, where any of the processes was asked to stop.
    """
    group, file = Group.current(), folder / "curve.json"
    trained = {name: value for part in parts for name, value in part.parameters.items()}
    best = {f"best.{name}": value.detach().clone() for name, value in trained.items()} if validate else {}
    state = TrainingState(folder, {**trained, **best}, [each for part in parts for each in part.optimizers])
    first = state.restore()
    bar.resume(first)
    known: list[Point] = group.first(lambda: read_json(file) if file.exists() else [])
    curve = [point for point in known if point["step"] <= first]

    def hold_out(done: int) -> None:
        """A point of the curve; the weights are kept if it is the best."""
        if validate is None or (done % math.ceil(steps / 10) and done != steps):
            return
        curve.append(validate(done))
        if best_point(curve) is curve[-1]:
            for name, value in trained.items():
                best[f"best.{name}"].copy_(value.detach())
        group.first(lambda: write_json(file, curve))

    if not curve:
        hold_out(0)
    skips = most_skips = torch.zeros(len(parts), device=next(iter(trained.values())).device)
    looked, next_look, looked_at = first, first + 1, time.monotonic()
    with state, _stop_signals() as stop:
        for step in range(first, steps):
            shown, rate = gradients(step), schedule(step, steps=steps, warmup=warmup)
            # Steps in a row without a finite gradient: now, and the most so far. Nothing here waits for the device.
            skips = (skips + 1) * _step(parts, rate, max_grad_norm)
            most_skips = torch.maximum(most_skips, skips)
            done = step + 1
            hold_out(done)
            if done >= next_look or done == steps:
                seen = torch.stack([*(figure.detach().float() for figure in shown.values()), *most_skips]).tolist()
                flags = [bool(stop), group.leads and state.timer.due(), time.monotonic() - looked_at]
                asked, due, seconds = group.sum(torch.tensor(flags)).tolist()
                bar.advance(done - looked, **dict(zip(shown, seen, strict=False)))
                next_look = done + steps_between_looks(seconds / group.size / (done - looked))
                looked, looked_at = done, time.monotonic()
                if asked or due:
                    state.save(done)
                if asked:
                    state.wait()
                    raise KeyboardInterrupt
                if min(seen[len(shown) :]) >= _MAX_SKIPS:
                    break
    diverged = [part.name for part, most in zip(parts, most_skips.tolist(), strict=True) if most >= _MAX_SKIPS]
    return Trained(curve, {name.removeprefix("best."): value for name, value in best.items()}, diverged)


def schedule(step: int, *, steps: int, warmup: float) -> float:
    """The share of the highest rate: up linearly over the share `warmup` of the steps, then down a cosine to zero."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def adamw(parameters: Iterable[Tensor], learning_rate: float, *, weight_decay: float = 0.0) -> Optimizer:
    """AdamW; matrices decay, vectors do not. Betas are those usual for language models: the paper gives none."""
    groups: dict[float, list[Tensor]] = {}  # each is launched alone: without decay there is one
    for value in parameters:
        groups.setdefault(weight_decay if value.ndim > 1 else 0.0, []).append(value)
    every = [{"params": values, "weight_decay": decay} for decay, values in groups.items()]
    return torch.optim.AdamW(every, learning_rate, (0.9, 0.95), fused=True)


def _step(parts: Sequence[Part], rate: float, max_grad_norm: float) -> Tensor:
    """A step at this share of the highest rate, of each part none if a gradient is not finite: which were skipped, 0/1.

    Nothing is launched more than once a part: BLD has hundreds of small ones.
    """
    gradients = [[each.grad for each in part.parameters.values() if each.grad is not None] for part in parts]
    norm_P = _norms(gradients)
    skipped_P = (~norm_P.isfinite()).float()
    shrinks = (max_grad_norm / (norm_P + 1e-6)).clamp(max=1.0).unbind()
    for part, own, shrink, skipped in zip(parts, gradients, shrinks, skipped_P.unbind(), strict=True):
        torch._foreach_mul_(own, shrink)
        for optimizer in part.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.setdefault("initial_lr", group["lr"])
            optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by fused ones, as of a GradScaler
            if getattr(optimizer, "_step_supports_amp_scaling", False) or not skipped:  # others wait for the device
                optimizer.step()
            optimizer.zero_grad()
    return skipped_P


def _norms(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Of each part's gradients, [parts]; parts with equally many go together, so that none depends on the others."""
    every = iter(torch._foreach_norm([each for own in gradients for each in own]))
    norms = [[*islice(every, len(own))] for own in gradients]
    found: dict[int, Tensor] = {}
    for count in {len(own) for own in norms}:
        places = [place for place, own in enumerate(norms) if len(own) == count]
        stacked = torch.stack([norm for place in places for norm in norms[place]])
        whole = stacked.full_tensor() if isinstance(stacked, DTensor) else stacked
        found |= zip(places, torch.linalg.vector_norm(whole.view(-1, count), dim=1).unbind(), strict=True)
    return torch.stack([found[place] for place in range(len(gradients))])


def best_point(curve: Sequence[Point]) -> Point:
    return min(curve, key=lambda point: point["validation_kl"])


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Note SIGTERM (preempted machines) and Ctrl-C instead of ending at once, so that the state can be saved first.

    A second Ctrl-C ends a process alone at once; with torchrun, one may arrive twice, from it and from the terminal.
    """
    asked: list[int] = []
    alone = Group.current().size == 1

    def ask(number: int, _: object) -> None:
        if asked and alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
