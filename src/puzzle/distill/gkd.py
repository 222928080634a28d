"""Global knowledge distillation: the assembled child trained as a whole towards the parent (paper section 2.5)."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.distill.adapters import add_adapters, merge_adapters
from puzzle.distill.batches import Batches, find_boundary
from puzzle.distill.teachers import (
    CachedTeacher,
    Lesson,
    LikeliestTokens,
    LiveTeacher,
    Teacher,
    all_batches,
    fill_cache,
)
from puzzle.distill.trainer import Curve, Training, read_curve, remove_state
from puzzle.distributed.group import Group
from puzzle.distributed.sharding import fill, shard
from puzzle.distributed.together import train_on_cluster
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
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
    if run.on is not None:
        train_on_cluster(run, partial(distil, parent=parent, child=child, data=data, label=label), _shared(run))
        return distilled
    boundary = find_boundary(run, parent, data) if run.recipe.distil.documents else None
    batches = Batches(data, run.recipe.distil, run.recipe.seed, boundary)
    lesson = _lesson(run, parent, child, _cache(run, parent, data, batches))
    training = Training(run, stage, lesson, batches, _trainable(run, lesson.student), _new_layers(parent, child))
    curve = training.train(label)
    if run.leads:
        _save(child, training.best(curve), distilled, parent)
        best = min(curve, key=lambda point: point["validation_kl"])
        stage.commit(tokens=curve[-1]["tokens"], best_step=best["step"], validation_kl=best["validation_kl"])
        remove_state(stage.path)
    Group.current().wait()
    return distilled


def _shared(run: Run) -> int:
    """Sequences that processes may share out: those of a batch, or one where all must be in one process."""
    settings = run.recipe.distil
    alone = settings.adapter_rank is not None or settings.optimizer == "adamw8bit"
    return 1 if alone else settings.batch_size // settings.accumulate


def distillation_curve(child: Child) -> Curve:
    """Steps, tokens, and the loss and KL on validation text along the way."""
    return read_curve(child.path.with_name("curve.json"))


def _new_layers(parent: Parent, child: Child) -> set[int]:
    pairs = zip(child.architecture.blocks, parent.architecture.blocks, strict=True)
    return {layer for layer, (block, own) in enumerate(pairs) if block != own}


def _save(child: Child, weights: Mapping[str, Tensor], distilled: Child, parent: Parent) -> None:
    """The child with these weights in place of its own, as a checkpoint."""
    student = child.load()
    own = dict(student.named_parameters())
    for name in weights.keys() & own.keys():
        own[name].copy_(weights[name])
    merge_adapters(student, weights)
    shutil.rmtree(distilled.path, ignore_errors=True)
    save_checkpoint(student, distilled.path, extra_files_from=parent.path)


def _lesson(run: Run, parent: Parent, child: Child, cache: Path | None) -> Lesson:
    """Teacher and child, filled after they are shared out, so that no process ever holds more than its share."""
    precision: torch.dtype = getattr(torch, run.recipe.precision)
    student = empty_model(child.config)
    _shard_layers(run, student, precision)
    if cache is None:
        teacher: Teacher = LiveTeacher(_sharded(run, parent))
    else:
        teacher = CachedTeacher(cache, precision)
    lesson = Lesson(teacher, student)
    shard(lesson, run.device)
    if isinstance(teacher, LiveTeacher):
        _load(run, teacher.model, parent, precision)
    _load(run, student, child, torch.float32 if run.recipe.distil.adapter_rank is None else precision)
    return lesson


def _trainable(run: Run, student: PuzzleForCausalLM) -> dict[str, Tensor]:
    """The child's parameters that train: all, or those of adapters."""
    rank = run.recipe.distil.adapter_rank
    if rank is None:
        return dict(student.requires_grad_(True).named_parameters())
    if Group.current().size > 1:
        raise PuzzleError("distil.adapter_rank: adapters are for one process; set it to null, or leave torchrun out")
    return add_adapters(student, rank, run.recipe.seed)


def _sharded(run: Run, parent: Parent) -> PuzzleForCausalLM:
    model = empty_model(parent.config)
    _shard_layers(run, model)
    shard(model, run.device)
    return model


def _shard_layers(run: Run, model: PuzzleForCausalLM, products: torch.dtype | None = None) -> None:
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            shard(layer, run.device, products)


def _load(run: Run, model: PuzzleForCausalLM, source: Parent | Child, dtype: torch.dtype) -> None:
    fill(model, source.tensors(), run.device, dtype)
    finish(model, run.device)


def _cache(run: Run, parent: Parent, data: TokenData, batches: Batches) -> Path | None:
    """What the parent says of every batch, on disk; children that read the same batches share it."""
    kept = run.recipe.distil.teacher_cache
    if kept is None:
        return None
    run.log(
        f"distil: from the parent's {kept} likeliest tokens; hidden states are not compared, "
        "and the KL counts all other tokens as one"
    )
    read = {"tokens", "batch_size", "accumulate", "ladder", "documents", "teacher_cache", "validation_tokens"}
    settings = run.recipe.distil.model_dump(mode="json", include=read) | {
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage("teacher", version=1, settings=settings, inputs=(parent.address, data.address))
    folder = stage.path / "batches"
    Group.current().wait()  # until the first has made the folder
    if not stage.done:
        likeliest = LikeliestTokens(_sharded(run, parent), kept)
        shard(likeliest, run.device)
        _load(run, likeliest.model, parent, getattr(torch, run.recipe.precision))
        fill_cache(folder, likeliest, all_batches(batches), batches.steps * run.recipe.distil.accumulate)
        Group.current().wait()
        if run.leads:
            stage.commit()
    return folder
