"""Global knowledge distillation: the assembled child trained as a whole towards the parent (paper section 2.5)."""

import shutil
from pathlib import Path

import torch

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.distill.batches import Batches, find_boundary
from puzzle.distill.teachers import CachedTeacher, LiveTeacher, Teacher, all_batches, fill_cache
from puzzle.distill.trainer import Curve, Training, read_curve, remove_state
from puzzle.modeling import save_checkpoint
from puzzle.parents import Parent
from puzzle.runs import Run


def distil(run: Run, parent: Parent, child: Child, data: TokenData, label: str = "child") -> Child:
    """Train the child; the curve is kept in `curve.json`, the weights of its best point in `checkpoint/`.

    Raises:
        PuzzleError: the training diverged.
    """
    settings = run.recipe.distil.model_dump(mode="json", exclude={"checkpointing", "log"}) | {
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage("distil", version=2, settings=settings, inputs=(parent.address, child.address, data.address))
    distilled = Child(stage.path / "checkpoint", stage.address, child.architecture)
    if stage.done:
        remove_state(stage.path)
        return distilled
    boundary = find_boundary(run, parent, data) if run.recipe.distil.documents else None
    batches = Batches(data, run.recipe.distil, run.recipe.seed, boundary)
    teacher = _teacher(run, parent, data, batches)
    student = child.load(device=run.device)
    curve = Training(run, stage, teacher, student, batches, _new_layers(parent, child)).train(label)
    best = min(curve, key=lambda point: point["validation_kl"])
    if best["step"] == 0:
        student = child.load()
    shutil.rmtree(distilled.path, ignore_errors=True)
    save_checkpoint(student, distilled.path, extra_files_from=parent.path)
    stage.commit(tokens=curve[-1]["tokens"], best_step=best["step"], validation_kl=best["validation_kl"])
    remove_state(stage.path)
    return distilled


def distillation_curve(child: Child) -> Curve:
    """Steps, tokens, and the loss and KL on validation text along the way."""
    return read_curve(child.path.with_name("curve.json"))


def _new_layers(parent: Parent, child: Child) -> set[int]:
    pairs = zip(child.architecture.blocks, parent.architecture.blocks, strict=True)
    return {layer for layer, (block, own) in enumerate(pairs) if block != own}


def _teacher(run: Run, parent: Parent, data: TokenData, batches: Batches) -> Teacher:
    precision: torch.dtype = getattr(torch, run.recipe.precision)
    kept = run.recipe.distil.teacher_cache
    if kept is None:
        return LiveTeacher(parent.load(dtype=precision, device=run.device))
    run.log(
        f"distil: from the parent's {kept} likeliest tokens; hidden states are not compared, "
        "and the KL counts all other tokens as one"
    )
    return CachedTeacher(_cache(run, parent, data, batches, kept), precision)


def _cache(run: Run, parent: Parent, data: TokenData, batches: Batches, kept: int) -> Path:
    """What the parent says of every batch, on disk; children that read the same batches share it."""
    read = {"tokens", "batch_size", "accumulate", "ladder", "documents", "teacher_cache", "validation_tokens"}
    settings = run.recipe.distil.model_dump(mode="json", include=read) | {
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage("teacher", version=1, settings=settings, inputs=(parent.address, data.address))
    folder = stage.path / "batches"
    if not stage.done:
        model = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device)
        fill_cache(folder, model, all_batches(batches), batches.steps * run.recipe.distil.accumulate, kept)
        stage.commit()
    return folder
