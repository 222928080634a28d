"""The training loop of GKD: steps, held-out points, the best weights so far; killed anywhere, it goes on.

One process or several, each with its share of the sequences and of every tensor, take the same steps but for the order
of sums.

training000320/         parameters, moments, what the spike guard remembers, steps done
curve.json              the held-out points
best000320.safetensors  parameters at the best of them
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import puzzle.training
from puzzle.distill.batches import Batches
from puzzle.distill.losses import Objective
from puzzle.distill.optimizers import build_optimizers
from puzzle.distill.spikes import MAX_SKIPS, SpikeGuard
from puzzle.distill.teachers import Lesson
from puzzle.distill.trackers import Tracker, open_trackers
from puzzle.distributed.group import Group
from puzzle.distributed.old_state import ShardedState, remove_states
from puzzle.distributed.sharding import collect, release, whole
from puzzle.distributed.stop import stop_when_asked
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM
from puzzle.runs import Run, StageFolder, progress, read_json, read_tensors, write_json, write_tensors
from puzzle.training import learning_rate, set_learning_rate

_VALIDATIONS = 10
"""Points of the held-out curve, the start not counted."""

_BEST = "best{}.safetensors"

Curve = list[dict[str, float]]


def read_curve(file: Path) -> Curve:
    """The points so far, oldest first; none if there is no file."""
    curve: Curve = read_json(file) if file.exists() else []
    return curve


def remove_state(folder: Path) -> None:
    """Delete what only a training that goes on would need."""
    remove_states(folder)
    for file in folder.glob(_BEST.format("*")):
        file.unlink()


class Training:
    """The lesson's child, in float32, on its way to the parent.

    Args:
        stage: whose folder holds the files above.
        parameters: of the child, those that train.
        new_layers: those whose block differs from the parent's.
    """

    def __init__(
        self,
        run: Run,
        stage: StageFolder,
        lesson: Lesson,
        batches: Batches,
        parameters: Mapping[str, Tensor],
        new_layers: Collection[int],
    ) -> None:
        self._run, self._stage, self._lesson, self._group = run, stage, lesson, Group.current()
        self._batches, self._settings, self._parameters = batches, run.recipe.distil, parameters
        self._cosine_weight = 0.0 if self._settings.teacher_cache else self._settings.cosine_weight
        self._objective = Objective(
            **{name: getattr(self._settings, name) for name in Objective.__dataclass_fields__},
        )
        self._new = {
            name for name in self._parameters if any(name.startswith(f"model.layers.{layer}.") for layer in new_layers)
        }
        self._optimizers = build_optimizers(self._settings, self._parameters)
        self._guard = SpikeGuard()
        saved = {**self._parameters, "spikes": self._guard.memory}
        self._state = ShardedState(stage.path, saved, *self._optimizers)
        if self._settings.checkpointing:
            _checkpoint_layers(lesson.student)

    def train(self, label: str) -> Curve:
        """Train to the end, from where it stood; `curve.json` then holds all points, `best` the best weights.

        Raises:
            KeyboardInterrupt: after all was saved, where any of the processes was asked to stop.
        """
        settings, steps = self._settings, self._batches.steps
        first = self._state.restore()
        known = self._group.first(lambda: read_curve(self._curve_file))
        curve = [point for point in known if point["step"] <= first] or [self._point(0)]
        self._touch()
        seconds = 0.0
        with ExitStack() as stack:
            trackers = stack.enter_context(self._trackers())
            stop = stack.enter_context(stop_when_asked())
            bar = stack.enter_context(progress(f"GKD of the {label}", steps, first))
            for step in range(first, steps):
                if self._is_stale(curve):
                    self._run.log(f"GKD of the {label}: no better for {settings.patience} points, stopped at {step}")
                    break
                began = time.monotonic()
                numbers = self._step(step)
                seconds += time.monotonic() - began
                numbers["tokens/s"] = (step + 1 - first) * self._batches.tokens_per_step / seconds
                if (step + 1) % math.ceil(steps / _VALIDATIONS) == 0 or step + 1 == steps:
                    curve.append(self._point(step + 1))
                    self._save(curve)
                due = self._state.age() >= puzzle.training.CHECKPOINT_INTERVAL_S
                asked, due = self._group.any(stop.asked, due)
                if asked or due:
                    self._state.save(step + 1)
                if asked:
                    raise KeyboardInterrupt
                numbers["held-out KL"] = curve[-1]["validation_kl"]
                for tracker in trackers:
                    tracker.log(step + 1, numbers)
                bar.advance(**{name: numbers[name] for name in ("kl", "cosine", "held-out KL", "tokens/s")})
        return curve

    @contextmanager
    def _trackers(self) -> Iterator[list[Tracker]]:
        """Those of the first process."""
        settings = self._settings
        wanted = settings.log if self._group.leads else []
        with ExitStack() as stack:
            trackers = open_trackers(wanted, self._stage.path, self._stage.address[:12], settings.model_dump())
            for tracker in trackers:
                stack.callback(tracker.close)
            yield trackers

    @torch.no_grad()
    def _touch(self) -> None:
        """A forward with all parameters trainable, from which shared-out ones know in which dtype gradients come."""
        if self._group.size > 1:
            batch = next(self._batches.validation()).share(self._group)
            self._lesson(batch.to(self._run.device), self._objective, self._cosine_weight)
            release(self._lesson)

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimisers, or none if it would do harm; its losses and gradient norm."""
        settings = self._settings
        self._enter(step)
        rate = learning_rate(step, steps=self._batches.steps, peak=settings.learning_rate, warmup=settings.warmup)
        parts = []
        for batch in self._batches.training(step):
            own = batch.share(self._group).to(self._run.device)
            losses = self._lesson(own, self._objective, self._cosine_weight)
            (losses.total / settings.accumulate).backward()
            parts.append(torch.stack([losses.total.detach(), losses.kl, losses.cosine, losses.lm]))
        full_norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.max_grad_norm))
        means_4 = self._group.sum(torch.stack(parts).mean(0)) / self._group.size
        (loss, kl, cosine, lm), norm = means_4.tolist(), float(full_norm)
        if self._guard.admits(loss, norm):
            for optimizer in self._optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
        else:
            self._report_skip(step, loss, norm)
        for parameter in self._parameters.values():
            parameter.grad = None
        return {"loss": loss, "kl": kl, "cosine": cosine, "lm": lm, "gradient norm": norm, "learning rate": rate}

    def _enter(self, step: int) -> None:
        """Let the parameters train that do in this step; where that or the sequences' length change, so do norms."""
        new_only, _ = phase = self._phase(step)
        if step and phase != self._phase(step - 1):
            self._guard.clear()
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(not new_only or name in self._new)

    def _phase(self, step: int) -> tuple[bool, int]:
        new_only = bool(self._new) and step < round(self._settings.new_only * self._batches.steps)
        return new_only, self._batches.pieces(step)

    def _report_skip(self, step: int, loss: float, norm: float) -> None:
        found = f"loss {loss:.4g} and gradient norm {norm:.4g}"
        if self._guard.skips >= MAX_SKIPS:
            raise PuzzleError(
                f"distil: {MAX_SKIPS} steps in a row came to nothing, the last, {step}, with {found}; "
                "lower distil.learning_rate"
            )
        self._run.log_warning(f"distil: step {step} skipped, its {found} are far above the usual")

    @torch.no_grad()
    def _point(self, step: int) -> dict[str, float]:
        """A point of the curve: KL(parent || child) in nats on validation text, and the loss with that as its KL."""
        objective = Objective(lm_weight=self._objective.lm_weight)
        sums_4 = torch.zeros(4, dtype=torch.float64)
        for batch in self._batches.validation():
            own = batch.share(self._group).to(self._run.device)
            losses = self._lesson(own, objective, self._cosine_weight)
            parts_3 = torch.stack([losses.kl, losses.cosine, losses.lm]).double().cpu()
            sums_4 += own.num_tokens * torch.cat([parts_3, torch.ones(1)])
        release(self._lesson)
        *sums, tokens = self._group.sum(sums_4).tolist()
        kl, cosine, lm = (part / tokens for part in sums)
        if not math.isfinite(kl):
            raise PuzzleError(f"distil: the loss is not finite at step {step}; lower distil.learning_rate")
        weights = self._objective
        return {
            "step": step,
            "tokens": step * self._batches.tokens_per_step,
            "loss": weights.kl_weight * kl + self._cosine_weight * cosine + weights.lm_weight * lm,
            "validation_kl": kl,
        }

    def _save(self, curve: Curve) -> None:
        """Keep the newest point, and the weights if they are the best so far.

        The file of the best before goes last: whenever the training is cut off, that of the best point is there.
        """
        step, best = int(curve[-1]["step"]), _best(curve)
        if best == step:
            weights = collect(self._parameters)
            if self._group.leads:
                write_tensors(self._best_file(step), weights)
        if self._group.leads:
            write_json(self._curve_file, curve)
        self._state.save(step)
        if not self._group.leads:
            return
        for file in self._stage.path.glob(_BEST.format("*")):
            if file != self._best_file(best):
                file.unlink()

    def _is_stale(self, curve: Curve) -> bool:
        since = len(curve) - 1 - [point["step"] for point in curve].index(_best(curve))
        return self._settings.patience is not None and since >= self._settings.patience

    def best(self, curve: Curve) -> Mapping[str, Tensor]:
        """The weights where held-out KL was lowest, for the process that leads; none if that was before training."""
        best = _best(curve)
        if best == 0:
            self._run.log_warning("distil: held-out KL was lowest before training; the result is what it started from")
            return {}
        if best != curve[-1]["step"]:
            self._run.log(f"distil: the result is that of step {best}, where held-out KL was lowest")
        return read_tensors(self._best_file(best))

    @property
    def _curve_file(self) -> Path:
        return self._stage.path / "curve.json"

    def _best_file(self, step: int) -> Path:
        return self._stage.path / _BEST.format(f"{step:06d}")


def _best(curve: Sequence[Mapping[str, float]]) -> int:
    """The step of the point with the lowest held-out KL."""
    return int(min(curve, key=lambda point: point["validation_kl"])["step"])


def _checkpoint_layers(model: PuzzleForCausalLM) -> None:
    """Layers recompute their insides in the backward pass; dropout, which training mode would bring, stays off.

    Set on the layers themselves: the model's own method has another name in each version of transformers.
    """
    layers: Iterable[Any] = model.model.layers
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
