"""The training loop of GKD on one device: steps, held-out points, the best weights so far; killed anywhere, it goes on.

training.safetensors    parameters, moments, what the spike guard remembers, steps done
curve.json              the held-out points
best000320.safetensors  parameters at the best of them
"""

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puzzle.distill.batches import Batches
from puzzle.distill.losses import Objective
from puzzle.distill.optimizers import build_optimizers
from puzzle.distill.spikes import MAX_SKIPS, SpikeGuard
from puzzle.distill.teachers import Teacher
from puzzle.distill.trackers import open_trackers
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM
from puzzle.runs import Run, Stage, progress, read_json, read_tensors, write_json, write_tensors
from puzzle.training import TrainingState, learning_rate, set_learning_rate

_VALIDATIONS = 10
"""Points of the held-out curve, the start not counted."""

_STATE, _BEST = "training.safetensors", "best{}.safetensors"

Curve = list[dict[str, float]]


def read_curve(file: Path) -> Curve:
    """The points so far, oldest first; none if there is no file."""
    curve: Curve = read_json(file) if file.exists() else []
    return curve


def remove_state(folder: Path) -> None:
    """Delete what only a training that goes on would need."""
    for file in (folder / _STATE, *folder.glob(_BEST.format("*"))):
        file.unlink(missing_ok=True)


class Training:
    """The child `student`, in float32, on its way to `teacher`.

    Args:
        stage: whose folder holds the files above.
        new_layers: those whose block differs from the parent's.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        teacher: Teacher,
        student: PuzzleForCausalLM,
        batches: Batches,
        new_layers: Collection[int],
    ) -> None:
        self._run, self._stage, self._teacher, self._student = run, stage, teacher, student
        self._batches, self._settings = batches, run.recipe.distil
        self._cosine_weight = 0.0 if self._settings.teacher_cache else self._settings.cosine_weight
        self._objective = Objective(
            **{name: getattr(self._settings, name) for name in Objective.__dataclass_fields__},
        )
        self._parameters: dict[str, Tensor] = dict(student.requires_grad_(True).named_parameters())
        self._new = {
            name for name in self._parameters if any(name.startswith(f"model.layers.{layer}.") for layer in new_layers)
        }
        self._optimizers = build_optimizers(self._settings, self._parameters)
        self._guard = SpikeGuard()
        saved = {**self._parameters, "spikes": self._guard.memory}
        self._state = TrainingState(stage.path / _STATE, saved, *self._optimizers)
        if self._settings.checkpointing:
            _checkpoint_layers(student)

    def train(self, label: str) -> Curve:
        """Train to the end, from where it stood; the student then holds the best weights, `curve.json` all points."""
        settings, steps = self._settings, self._batches.steps
        first = self._state.restore()
        curve = [point for point in read_curve(self._curve_file) if point["step"] <= first] or [self._point(0)]
        seconds = 0.0
        with ExitStack() as stack:
            trackers = open_trackers(settings.log, self._stage.path, self._stage.address[:12], settings.model_dump())
            for tracker in trackers:
                stack.callback(tracker.close)
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
                self._state.save_if_due(step + 1)
                numbers["held-out KL"] = curve[-1]["validation_kl"]
                for tracker in trackers:
                    tracker.log(step + 1, numbers)
                bar.advance(**{name: numbers[name] for name in ("kl", "cosine", "held-out KL", "tokens/s")})
        self._student.requires_grad_(False)
        self._take_best(curve)
        return curve

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimisers, or none if it would do harm; its losses and gradient norm."""
        settings = self._settings
        self._enter(step)
        rate = learning_rate(step, steps=self._batches.steps, peak=settings.learning_rate, warmup=settings.warmup)
        parts = []
        for batch in self._batches.training(step):
            losses = self._teacher.losses(
                self._student, batch.to(self._run.device), self._objective, self._cosine_weight
            )
            (losses.total / settings.accumulate).backward()
            parts.append(torch.stack([losses.total.detach(), losses.kl, losses.cosine, losses.lm]))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), settings.max_grad_norm)
        loss, kl, cosine, lm, norm = torch.cat([torch.stack(parts).mean(0), norm.unsqueeze(0)]).tolist()
        if self._guard.admits(loss, norm):
            for optimizer in self._optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
        else:
            self._report_skip(step, loss, norm)
        self._student.zero_grad()
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
        sums_3, tokens = torch.zeros(3, dtype=torch.float64), 0
        for batch in self._batches.validation():
            losses = self._teacher.losses(self._student, batch.to(self._run.device), objective, self._cosine_weight)
            parts_3 = torch.stack([losses.kl, losses.cosine, losses.lm])
            sums_3 += batch.tokens_BT.numel() * parts_3.double().cpu()
            tokens += batch.tokens_BT.numel()
        kl, cosine, lm = (sums_3 / tokens).tolist()
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
            write_tensors(self._best_file(step), self._parameters)
        write_json(self._curve_file, curve)
        self._state.save(step)
        for file in self._stage.path.glob(_BEST.format("*")):
            if file != self._best_file(best):
                file.unlink()

    def _is_stale(self, curve: Curve) -> bool:
        since = len(curve) - 1 - [point["step"] for point in curve].index(_best(curve))
        return self._settings.patience is not None and since >= self._settings.patience

    def _take_best(self, curve: Curve) -> None:
        best = _best(curve)
        if best == 0:
            self._run.log_warning("distil: held-out KL was lowest before training; the result is what it started from")
        elif best != curve[-1]["step"]:
            self._run.log(f"distil: the result is that of step {best}, where held-out KL was lowest")
            _load(self._parameters, read_tensors(self._best_file(best)))

    @property
    def _curve_file(self) -> Path:
        return self._stage.path / "curve.json"

    def _best_file(self, step: int) -> Path:
        return self._stage.path / _BEST.format(f"{step:06d}")


def _best(curve: Sequence[Mapping[str, float]]) -> int:
    """The step of the point with the lowest held-out KL."""
    return int(min(curve, key=lambda point: point["validation_kl"])["step"])


@torch.no_grad()
def _load(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def _checkpoint_layers(model: PuzzleForCausalLM) -> None:
    """Layers recompute their insides in the backward pass; dropout, which training mode would bring, stays off.

    Set on the layers themselves: the model's own method has another name in each version of transformers.
    """
    layers: Iterable[Any] = model.model.layers
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
