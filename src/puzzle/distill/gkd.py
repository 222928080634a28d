"""Global knowledge distillation: the assembled child trained as a whole towards the parent (paper section 2.5).

One process or several, each with its share of the sequences and of every tensor, take the same steps but for the order
of sums.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puzzle.child import Child
from puzzle.data import TokenData
from puzzle.distill.batches import Batches
from puzzle.distill.teacher import Distillation, TopTokens, fill_cache
from puzzle.distributed.group import Group
from puzzle.distributed.sharding import collect, fill, release, shard, sync_gradients
from puzzle.distributed.together import train_on_cluster
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import Parent
from puzzle.runs import Run, progress, read_json
from puzzle.stages import DISTIL, TEACHER
from puzzle.training import Part, Point, adamw, remove_states, train


def distil(run: Run, parent: Parent, child: Child, data: TokenData, label: str = "child") -> Child:
    """Train the child; the held-out curve is kept in `curve.json`, the weights of its best point in `checkpoint/`.

    Raises:
        PuzzleError: the training diverged.
    """
    folder = run.open(DISTIL, parent=parent, child=child, data=data)
    distilled = Child(folder.path / "checkpoint", folder.address, child.architecture)
    if folder.done:
        remove_states(folder.path)
        return distilled
    settings = run.recipe.distil
    if run.on is not None:
        work = partial(distil, parent=parent, child=child, data=data, label=label)
        train_on_cluster(run, work, settings.batch_size // settings.accumulate)
        return distilled
    batches = Batches(data, settings, run.recipe.seed)
    model = _build(run, parent, child, _cache(run, parent, data, batches))
    parameters = dict(model.student.requires_grad_(True).named_parameters())
    optimizer = adamw(parameters.values(), settings.learning_rate, weight_decay=settings.weight_decay)
    with progress(f"GKD of the {label}", batches.steps) as bar:
        trained = train(
            [Part("child", parameters, [optimizer])],
            partial(_gradients, run, model, batches),
            steps=batches.steps,
            warmup=settings.warmup,
            max_grad_norm=settings.max_grad_norm,
            folder=folder.path,
            bar=bar,
            validate=partial(_validate, run, model, batches),
        )
    if trained.diverged:
        raise PuzzleError("distil: ten steps in a row had no finite gradient; lower distil.learning_rate")
    best, weights = trained.best_point, collect(trained.best)
    if run.leads:
        if best["step"] == 0:
            run.log_warning("distil: held-out KL was lowest before training, so the child is what it started from")
        elif best is not trained.curve[-1]:
            run.log(f"distil: the child is that of step {best['step']:.0f}, where held-out KL was lowest")
        _save(child, weights, distilled, parent)
        folder.commit(tokens=trained.curve[-1]["tokens"], best_step=best["step"], validation_kl=best["validation_kl"])
        remove_states(folder.path)
    Group.current().wait()
    return distilled


def distillation_curve(child: Child) -> list[Point]:
    """Steps, tokens, and the loss and KL on validation text along the way."""
    curve: list[Point] = read_json(child.path.with_name("curve.json"))
    return curve


def _gradients(run: Run, model: Distillation, batches: Batches, step: int) -> Mapping[str, Tensor]:
    """The gradients of a step, from its parts one after another; what processes hold is summed after the last."""
    count, kl, cosine = run.recipe.distil.accumulate, torch.zeros(()), torch.zeros(())
    for index, batch in enumerate(batches.training(step)):
        sync_gradients(model, index + 1 == count)
        losses = model(batch.share(Group.current(), run.device))
        (losses.total / count).backward()
        kl, cosine = kl.to(losses.kl) + losses.kl / count, cosine.to(losses.cosine) + losses.cosine / count
    return {"kl": kl, "cosine": cosine}


@torch.no_grad()
def _validate(run: Run, model: Distillation, batches: Batches, step: int) -> Point:
    """KL(parent || child) in nats on validation text, and the loss with that as its KL."""
    group, settings = Group.current(), run.recipe.distil
    sums_4 = torch.zeros(4, dtype=torch.float64, device=run.device)
    for batch in batches.validation():
        own = batch.share(group, run.device)
        _, kl, cosine, lm = model(own)
        sums_4 += own.num_tokens * torch.stack([kl, cosine, lm, torch.ones_like(kl)]).double()
    release(model)
    *sums, tokens = group.sum(sums_4).tolist()
    kl, cosine, lm = (part / tokens for part in sums)
    if not math.isfinite(kl):
        raise PuzzleError(f"distil: the loss is not finite at step {step}; lower distil.learning_rate")
    return {
        "step": step,
        "tokens": step * batches.tokens_per_step,
        "loss": settings.kl_weight * kl + settings.cosine_weight * cosine + settings.lm_weight * lm,
        "validation_kl": kl,
    }


def _build(run: Run, parent: Parent, child: Child, cache: Path | None) -> Distillation:
    """Child and teacher, filled after they are shared out, so that no process ever holds more than its share."""
    precision: torch.dtype = getattr(torch, run.recipe.precision)
    source = child.source()
    student = empty_model(source.config)
    teacher = None if cache is not None else empty_model(parent.config)
    _shard_layers(run, student, precision)
    if teacher is not None:
        _shard_layers(run, teacher)
    model = Distillation(student, teacher, cache, run.recipe.distil, precision)
    shard(model, run.device)
    _load(run, student, source, torch.float32)
    if teacher is not None:
        _load(run, teacher, parent, precision)
    if run.recipe.execution.checkpointing:
        _checkpoint_layers(student)
    return model


def _shard_layers(run: Run, model: PuzzleForCausalLM, products: torch.dtype | None = None) -> None:
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            shard(layer, run.device, products)


def _load(run: Run, model: PuzzleForCausalLM, source: Parent, dtype: torch.dtype) -> None:
    fill(model, source.tensors(), run.device, dtype)
    finish(model, run.device)


def _checkpoint_layers(model: PuzzleForCausalLM) -> None:
    """Layers recompute their activations in the backward pass; dropout, which training mode would bring, stays off.

    Set on the layers themselves: the model's own method has another name in each version of transformers.
    """
    layers: Iterable[Any] = model.model.layers
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _cache(run: Run, parent: Parent, data: TokenData, batches: Batches) -> Path | None:
    """The parent's top tokens of every batch on disk, if asked for; children that read the same batches share them."""
    kept = run.recipe.distil.teacher_cache
    if kept is None:
        return None
    run.log(
        f"distil: from the parent's {kept} likeliest tokens; hidden states are not compared, "
        "and the KL counts all other tokens as one"
    )
    folder = run.open(TEACHER, parent=parent, data=data)
    Group.current().wait()  # until the first has made the folder
    if not folder.done:
        model = empty_model(parent.config)
        _shard_layers(run, model)
        top_tokens = TopTokens(model, kept)
        shard(top_tokens, run.device)
        _load(run, model, parent, getattr(torch, run.recipe.precision))
        total = batches.steps * run.recipe.distil.accumulate
        fill_cache(folder.path / "batches", top_tokens, batches, total, run.device)
        Group.current().wait()
        if run.leads:
            folder.commit()
    return folder.path / "batches"


def _save(child: Child, weights: Mapping[str, Tensor], distilled: Child, parent: Parent) -> None:
    """The child with these weights in place of its own, as a checkpoint."""
    student = child.load()
    student.load_state_dict(dict(weights), strict=False)
    shutil.rmtree(distilled.path, ignore_errors=True)
    save_checkpoint(student, distilled.path, extra_files_from=parent.path)
