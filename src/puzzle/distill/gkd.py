"""Global knowledge distillation: the assembled child trained as a whole towards the parent (paper section 2.5).

One process or several, each with its share of the sequences and of every tensor, take the same steps but for the order
of sums.
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from puzzle.child import Child
from puzzle.data import RangeName, TokenData
from puzzle.distill.teacher import Batch, Distillation, TopTokens, fill_cache
from puzzle.distributed.group import Group
from puzzle.distributed.state import collect, fill, remove_states, shard
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, empty_model, finish, save_checkpoint
from puzzle.parents import Parent
from puzzle.runs import Run, progress, read_json
from puzzle.stages import DISTIL, TEACHER
from puzzle.training import Part, Point, adamw, best_point, train


def distil(run: Run, parent: Parent, child: Child, data: TokenData, label: str = "child") -> Child:
    """Train the child; the held-out curve is kept in `curve.json`, the weights of its best point in `checkpoint/`.

    With `distil.tokens` 0 it is the child itself.

    Raises:
        PuzzleError: the training diverged.
    """
    if not run.recipe.distil.tokens:
        return child
    folder = run.open(DISTIL, parent=parent, child=child, data=data)
    distilled = Child(folder.path / "checkpoint", folder.address, child.architecture)
    if folder.done:
        remove_states(folder.path)
        return distilled
    settings = run.recipe.distil
    if run.on is not None:
        from puzzle.distributed.ray import train_on_cluster

        work = partial(distil, parent=parent, child=child, data=data, label=label)
        train_on_cluster(run, work, settings.batch_size // settings.accumulate)
        return distilled
    batches = Batches(run, data, Group.current())
    model = _build(run, parent, child, _cache(run, parent, data))
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
    best, weights = best_point(trained.curve), collect(trained.best)
    if run.leads:
        if best is not trained.curve[-1]:
            log = run.log if best["step"] else run.log_warning
            log(f"distil: the child is that of step {best['step']:.0f}, where held-out KL was lowest")
        student = child.load()
        student.load_state_dict(weights, strict=False)
        shutil.rmtree(distilled.path, ignore_errors=True)
        save_checkpoint(student, distilled.path, extra_files_from=parent.path)
        folder.commit(tokens=trained.curve[-1]["tokens"], best_step=best["step"], validation_kl=best["validation_kl"])
        remove_states(folder.path)
    Group.current().wait()
    return distilled


class Batches:
    """The training and validation text of one distillation, by step, as far as one of several processes reads it."""

    def __init__(self, run: Run, data: TokenData, group: Group) -> None:
        settings = run.recipe.distil
        self._run, self._data, self._settings, self._group = run, data, settings, group
        self._size = settings.batch_size // settings.accumulate
        if self._size % group.size:
            fitting = ", ".join(str(count) for count in range(1, self._size + 1) if self._size % count == 0)
            raise PuzzleError(
                f"distil.batch_size: {settings.batch_size} sequences, in parts of {self._size} (distil.accumulate), "
                f"cannot be shared evenly by {group.size} processes; start {fitting} of them, or change these settings"
            )
        self.tokens_per_step = settings.batch_size * data.sequence_length
        self.steps = math.ceil(settings.tokens / self.tokens_per_step)

    def training(self, step: int) -> Iterator[Batch]:
        """The step's batches, of as many sequences each."""
        indices = self._data.training_indices(step, self._settings.batch_size, self._run.recipe.seed)
        for part in range(self._settings.accumulate):
            name = f"training{step * self._settings.accumulate + part:06d}"
            yield self._batch(name, "training", indices[part * self._size : (part + 1) * self._size])

    def validation(self) -> Iterator[Batch]:
        """Held-out text; the last batch may be smaller."""
        wanted = math.ceil(self._settings.validation_tokens / self._data.sequence_length)
        count = min(wanted, self._data.num_sequences("validation"))
        for index, start in enumerate(range(0, count, self._size)):
            yield self._batch(f"validation{index:06d}", "validation", range(start, min(start + self._size, count)))

    def __iter__(self) -> Iterator[Batch]:
        """Every batch that the distillation asks for."""
        for step in range(self.steps):
            yield from self.training(step)
        yield from self.validation()

    def _batch(self, name: str, source: RangeName, indices: range | NDArray[int64]) -> Batch:
        first, end = (len(indices) * rank // self._group.size for rank in (self._group.rank, self._group.rank + 1))
        rows = range(first, end) or range(1)
        own = indices[rows.start : rows.stop]
        sequences, device = self._data.sequences(source, own).to(self._run.device), self._run.device
        positions = self._data.positions(source, own)[:, :-1]
        # Looked at before they are on a GPU: without a mask attention is several times as fast.
        one = torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions))
        apart = positions.to(device) if self._settings.documents and not one else None
        return Batch(name, sequences[:, :-1], sequences[:, 1:], apart, rows.start, int(first < end))


def distillation_curve(child: Child) -> list[Point]:
    """Steps, tokens, and the KL on validation text along the way; nothing of a child that was not trained."""
    file = child.path.with_name("curve.json")
    return read_json(file) if file.exists() else []


def _gradients(run: Run, model: Distillation, batches: Batches, step: int) -> Mapping[str, Tensor]:
    """The gradients of a step, from its parts one after another; what processes hold is summed after the last."""
    count = run.recipe.distil.accumulate
    kl = cosine = torch.zeros((), device=run.device)
    for index, batch in enumerate(batches.training(step)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(index + 1 == count)
        losses = model(batch)
        (losses.total / count).backward()
        kl, cosine = kl + losses.kl / count, cosine + losses.cosine / count
    return {"kl": kl, "cosine": cosine}


@torch.no_grad()
def _validate(run: Run, model: Distillation, batches: Batches, step: int) -> Point:
    """KL(parent || child) in nats on validation text."""
    sums_2 = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in batches.validation():
        kl = model(batch).kl
        sums_2 += batch.num_tokens * torch.stack([kl, torch.ones_like(kl)]).double()
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward pass, it would keep what it gathered
    kl_sum, tokens = Group.current().sum(sums_2).tolist()
    if not math.isfinite(kl_sum):
        raise PuzzleError(f"distil: the loss is not finite at step {step}; lower distil.learning_rate")
    return {"step": step, "tokens": step * batches.tokens_per_step, "validation_kl": kl_sum / tokens}


def _build(run: Run, parent: Parent, child: Child, cache: Path | None) -> Distillation:
    """Child and teacher; the child's layers recompute their activations in the backward pass, if asked for."""
    source, precision = child.source(), getattr(torch, run.recipe.precision)
    student, teacher = empty_model(source.config), empty_model(parent.config) if cache is None else None
    model = Distillation(student, teacher, cache, run.recipe.distil, precision)
    _fill(run, model, [(student, source, torch.float32)] + ([(teacher, parent, precision)] if teacher else []))
    if run.recipe.execution.checkpointing:
        # Set on the layers themselves: the model's own method has another name in each version of transformers, and
        # training mode would bring dropout.
        layers: Iterable[Any] = student.model.layers
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return model


def _fill(run: Run, whole: nn.Module, models: Sequence[tuple[PuzzleForCausalLM, Parent, torch.dtype]]) -> None:
    """Share out the models in `whole`, then give them their weights: no process ever holds more than its share."""
    layers = [layer for model, _, _ in models for layer in model.model.layers]
    shard(whole, layers, run.device, getattr(torch, run.recipe.precision))
    for model, source, dtype in models:
        fill(model, source.tensors(), run.device, dtype)
        finish(model, run.device)


def _cache(run: Run, parent: Parent, data: TokenData) -> Path | None:
    """The parent's top tokens of every batch on disk, if asked for; children that read the same batches share them."""
    kept = run.recipe.distil.teacher_cache
    if kept is None:
        return None
    run.log(f"distil: from the parent's {kept} likeliest tokens, all others counting as one; no cosine")
    folder = run.open(TEACHER, parent=parent, data=data)
    if not folder.done:
        top_tokens = TopTokens(empty_model(parent.config), kept)
        _fill(run, top_tokens, [(top_tokens.model, parent, getattr(torch, run.recipe.precision))])
        batches = Batches(run, data, Group(0, 1))
        fill_cache(folder.path / "batches", top_tokens, batches, batches.steps * run.recipe.distil.accumulate)
        Group.current().wait()
        if run.leads:
            folder.commit()
    return folder.path / "batches"
