"""Global knowledge distillation: the assembled child trained as a whole towards the parent (paper section 2.5)."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.distill.losses import cosine_loss, kl_loss
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, save_checkpoint
from puzzle.parents import Parent
from puzzle.recipe import DistilSettings
from puzzle.runs import Run, progress, write_json
from puzzle.training import BETAS, TrainingState, autocast, learning_rate, set_learning_rate

_VALIDATIONS = 10
"""Points of the held-out curve."""


def distil(run: Run, parent: Parent, child: Child, data: TokenData, label: str = "child") -> Child:
    """Train the child; the curve is kept in `curve.json`, the result in `checkpoint/`."""
    settings = run.recipe.distil.model_dump(mode="json") | {
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage("distil", version=1, settings=settings, inputs=(parent.address, child.address, data.address))
    distilled = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        return distilled
    dtype = getattr(torch, run.recipe.precision)
    teacher = parent.load(dtype=dtype, device=run.device)
    student = child.load(device=run.device)
    curve = _train(run, stage.path, teacher, student, data, label)
    shutil.rmtree(distilled.path, ignore_errors=True)
    save_checkpoint(student, distilled.path, extra_files_from=parent.path)
    (stage.path / "training.safetensors").unlink(missing_ok=True)
    stage.commit(tokens=curve[-1]["tokens"] if curve else 0)
    return distilled


def distillation_curve(child: Child) -> list[dict[str, float]]:
    """Steps, tokens, and the loss and KL on validation text along the way."""
    return _read_curve(child.path.with_name("curve.json"))


@dataclass(frozen=True)
class _Losses:
    """One batch's loss and its parts."""

    total: Tensor
    cosine: Tensor
    kl: Tensor


def _train(
    run: Run, path: Path, teacher: PuzzleForCausalLM, student: PuzzleForCausalLM, data: TokenData, label: str
) -> list[dict[str, float]]:
    settings = run.recipe.distil
    steps = math.ceil(settings.tokens / (settings.batch_size * data.sequence_length))
    parameters = dict(student.requires_grad_(True).named_parameters())
    decayed = [value for value in parameters.values() if value.ndim > 1]
    others = [value for value in parameters.values() if value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    state = TrainingState(path / "training.safetensors", parameters, optimizer)
    first = state.restore()
    curve_file = path / "curve.json"
    curve = [point for point in _read_curve(curve_file) if point["step"] <= first]
    if not curve:
        curve = [_point(run, teacher, student, data, step=0)]
    with progress(f"GKD of the {label}", steps, first) as bar:
        for step in range(first, steps):
            rate = learning_rate(step, steps=steps, peak=settings.learning_rate, warmup=settings.warmup)
            set_learning_rate(optimizer, rate)
            tokens_BT = data.training_batch(step, settings.batch_size, run.recipe.seed)[:, :-1].to(run.device)
            losses = _losses(teacher, student, tokens_BT, settings)
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % math.ceil(steps / _VALIDATIONS) == 0 or step + 1 == steps:
                curve.append(_point(run, teacher, student, data, step=step + 1))
                write_json(curve_file, curve)
                state.save(step + 1)
            state.save_if_due(step + 1)
            bar.advance(kl=float(losses.kl), cosine=float(losses.cosine))
    student.requires_grad_(False)
    return curve


def _read_curve(file: Path) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    return curve


def _losses(
    teacher: PuzzleForCausalLM, student: PuzzleForCausalLM, tokens_BT: Tensor, settings: DistilSettings
) -> _Losses:
    """Parent and child forward in lock step, layer by layer, so that no hidden states pile up."""
    with autocast(student.device, teacher.dtype):
        with torch.no_grad():
            parent_BTD = teacher.model.embed_tokens(tokens_BT)
            parent_context = teacher.model.context(parent_BTD)
        child_BTD = student.model.embed_tokens(tokens_BT)
        context = student.model.context(child_BTD)
        cosines = []
        for parent_layer, layer in zip(teacher.model.layers, student.model.layers, strict=True):
            with torch.no_grad():
                parent_BTD = parent_layer(parent_BTD, **parent_context)
            child_BTD = layer(child_BTD, **context)
            cosines.append(cosine_loss(child_BTD, parent_BTD))
        kl = kl_loss(student, teacher, child_BTD, parent_BTD)
    cosine = torch.stack(cosines).mean()
    return _Losses(settings.cosine_weight * cosine + settings.kl_weight * kl, cosine.detach(), kl.detach())


@torch.no_grad()
def _point(
    run: Run, teacher: PuzzleForCausalLM, student: PuzzleForCausalLM, data: TokenData, *, step: int
) -> dict[str, float]:
    """A point of the curve: the loss and its KL part on validation text."""
    settings = run.recipe.distil
    batches = [
        _losses(teacher, student, sequences[:, :-1].to(run.device), settings)
        for sequences in data.batches("validation", settings.batch_size, settings.validation_tokens)
    ]
    validation_kl = sum(float(losses.kl) for losses in batches) / len(batches)
    if not math.isfinite(validation_kl):
        raise PuzzleError(f"distil: the loss is not finite at step {step}; lower distil.learning_rate")
    return {
        "step": step,
        "tokens": step * settings.batch_size * data.sequence_length,
        "loss": sum(float(losses.total) for losses in batches) / len(batches),
        "validation_kl": validation_kl,
    }
