"""The parent as a teacher: beside the child, layer by layer, or from a cache of its likeliest next tokens.

Shapes: B batch, T tokens, N = B * T, D hidden size, V vocabulary, K tokens kept.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from puzzle.distill.batches import Batch, Batches
from puzzle.distill.losses import HeadLosses, Objective, ParentHead, TopTokens, cosine_loss, head_losses
from puzzle.distributed.group import Group
from puzzle.distributed.sharding import gathered
from puzzle.modeling import PuzzleForCausalLM
from puzzle.runs import progress, read_tensors, write_tensors
from puzzle.training import autocast

_CHUNK_TOKENS = 64


class Losses(NamedTuple):
    """A batch's loss and its parts, means over tokens."""

    total: Tensor
    """The weighted sum, with its gradient."""
    kl: Tensor
    """The divergence asked for."""
    cosine: Tensor
    """Mean over the layers that the child has."""
    lm: Tensor


class Teacher(nn.Module):
    """What the child learns from."""

    def losses(self, student: PuzzleForCausalLM, batch: Batch, objective: Objective, cosine_weight: float) -> Losses:
        """The child's losses on a batch; those without a weight are 0."""
        raise NotImplementedError


class Lesson(nn.Module):
    """Teacher and child as one module, whose `forward` is all that a batch takes: what several processes share out."""

    def __init__(self, teacher: Teacher, student: PuzzleForCausalLM) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, batch: Batch, objective: Objective, cosine_weight: float) -> Losses:
        return self.teacher.losses(self.student, batch, objective, cosine_weight)


class LiveTeacher(Teacher):
    """The parent itself, run with the child in lock step: block i of both, and the cosine of what leaves it at once.

    A layer that is neither attention nor FFN in the child passes on what enters it and has no cosine.
    """

    def __init__(self, model: PuzzleForCausalLM) -> None:
        super().__init__()
        self.model = model

    def losses(self, student: PuzzleForCausalLM, batch: Batch, objective: Objective, cosine_weight: float) -> Losses:
        teacher = self.model
        with autocast(batch.tokens_BT.device, teacher.dtype), gathered(teacher):
            with torch.no_grad():
                parent_BTD = teacher.model.embed_tokens(batch.tokens_BT)
                parent_context = teacher.model.context(parent_BTD, position_ids=batch.positions_BT)
            child_BTD = student.model.embed_tokens(batch.tokens_BT)
            context = student.model.context(child_BTD, position_ids=batch.positions_BT)
            cosines = []
            for parent_layer, layer in zip(teacher.model.layers, student.model.layers, strict=True):
                with torch.no_grad():
                    parent_BTD = parent_layer(parent_BTD, **parent_context)
                child_BTD = layer(child_BTD, **context)
                if cosine_weight and (layer.has_attention or layer.has_ffn):
                    cosines.append(cosine_loss(child_BTD, parent_BTD))
            with torch.no_grad():
                parent_ND = teacher.model.norm(parent_BTD).flatten(0, 1)
            reference = ParentHead(parent_ND, teacher.lm_head.weight)
            child_ND = student.model.norm(child_BTD).flatten(0, 1)
            head = head_losses(child_ND, student.lm_head.weight, reference, batch.targets_BT.flatten(), objective)
        cosine = torch.stack(cosines).mean() if cosines else head.total.new_zeros(())
        return _sum(head, cosine, cosine_weight)


class CachedTeacher(Teacher):
    """The parent's K likeliest next tokens from disk, a file for each batch; it has no hidden states to compare."""

    def __init__(self, folder: Path, precision: torch.dtype) -> None:
        super().__init__()
        self._folder, self._precision = folder, precision

    def losses(self, student: PuzzleForCausalLM, batch: Batch, objective: Objective, cosine_weight: float) -> Losses:
        device = batch.tokens_BT.device
        begin = batch.first * batch.tokens_BT.shape[1]
        cached = {
            name: tensor_NK[begin : begin + batch.tokens_BT.numel()].to(device)
            for name, tensor_NK in read_tensors(_file(self._folder, batch)).items()
        }
        reference = TopTokens(cached["ids_NK"].long(), cached["log_probabilities_NK"])
        with autocast(device, self._precision):
            outputs = student.model(batch.tokens_BT, position_ids=batch.positions_BT, use_cache=False)
            child_ND = outputs.last_hidden_state.flatten(0, 1)
            head = head_losses(child_ND, student.lm_head.weight, reference, batch.targets_BT.flatten(), objective)
        return _sum(head, head.total.new_zeros(()), 0.0)


class LikeliestTokens(nn.Module):
    """The parent's `num_tokens` likeliest next tokens."""

    def __init__(self, model: PuzzleForCausalLM, num_tokens: int) -> None:
        super().__init__()
        self.model, self._num_tokens = model, min(num_tokens, model.config.vocab_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        model = self.model
        with autocast(batch.tokens_BT.device, model.dtype), gathered(model):
            outputs = model.model(batch.tokens_BT, position_ids=batch.positions_BT, use_cache=False)
            parts = [
                torch.log_softmax(model.lm_head(rows_ND).float(), -1).topk(self._num_tokens, -1)
                for rows_ND in outputs.last_hidden_state.flatten(0, 1).split(_CHUNK_TOKENS)
            ]
        return {
            "ids_NK": torch.cat([part.indices for part in parts]).int(),
            "log_probabilities_NK": torch.cat([part.values for part in parts]),
        }


@torch.no_grad()
def fill_cache(folder: Path, likeliest: LikeliestTokens, batches: Iterable[Batch], total: int) -> None:
    """Write what the parent says of each of `total` batches, each process in its turn; those on disk are kept."""
    group = Group.current()
    folder.mkdir(exist_ok=True)
    with progress("teacher cache", total) as bar:
        for batch in _turns(batches, group):
            lacks = not _file(folder, batch).exists()
            if group.any(lacks)[0]:
                tensors = likeliest(batch.to(likeliest.model.device))
                if lacks:
                    write_tensors(_file(folder, batch), tensors)
            bar.advance(group.size)


def _turns(batches: Iterable[Batch], group: Group) -> Iterator[Batch]:
    """Every so many-th batch; where they do not come out even, the last process repeats what another has."""
    read = iter(batches)
    while turn := list(islice(read, group.size)):
        yield turn[min(group.rank, len(turn) - 1)]


def all_batches(batches: Batches) -> Iterable[Batch]:
    """Every batch that a distillation will ask for."""
    for step in range(batches.steps):
        yield from batches.training(step)
    yield from batches.validation()


def _file(folder: Path, batch: Batch) -> Path:
    return folder / f"{batch.name}.safetensors"


def _sum(head: HeadLosses, cosine: Tensor, cosine_weight: float) -> Losses:
    return Losses(head.total + cosine_weight * cosine, head.divergence, cosine.detach(), head.lm)
