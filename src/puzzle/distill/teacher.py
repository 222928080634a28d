"""The parent as a teacher: beside the child, layer by layer, or from a cache of its likeliest next tokens.

Shapes: B batch, T tokens, N = B * T, D hidden size, V vocabulary, K tokens kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from puzzle.device import autocast, float32_operand, float32_product
from puzzle.distill.losses import KL, cosine_loss, head_losses, kl_to_head, kl_to_top_tokens
from puzzle.distributed.group import Group
from puzzle.modeling import PuzzleForCausalLM, PuzzleMasks, capped
from puzzle.recipe import DistilSettings
from puzzle.runs import progress, read_tensors, write_tensors


@dataclass(frozen=True)
class Batch:
    """Sequences that a process runs at once: its share of a batch."""

    name: str
    """Of the whole batch, such as `training000012`: no other batch of the training has it."""
    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None
    """In its own document, where a sequence has several that are kept apart; None where it has none or one."""
    first: int = 0
    """Where its sequences begin in the whole batch."""
    counted: int = 1
    """0 of a share that stands in for an empty one, since no process may leave out a forward."""

    @property
    def num_tokens(self) -> int:
        """Tokens that count in means."""
        return self.counted * self.tokens_BT.numel()


def _masks(model: PuzzleForCausalLM, batch: Batch) -> PuzzleMasks | None:
    """Within documents, for all models alike; nothing is read back from the device."""
    if batch.positions_BT is None:
        return None
    as_hidden_BT1 = batch.positions_BT.unsqueeze(-1).to(model.lm_head.weight.dtype)
    return PuzzleMasks(model.config, as_hidden_BT1, None, batch.positions_BT, None, packed=True)


class Losses(NamedTuple):
    """A batch's loss and its parts, means over tokens; parts without a weight are 0."""

    total: Tensor
    """The weighted sum, with its gradient."""
    kl: Tensor
    cosine: Tensor
    """Mean over the layers that the child has."""


class Distillation(nn.Module):
    """Child and teacher as one module, whose `forward` is all that a batch takes: what several processes share out.

    Args:
        teacher: the parent, or None where its likeliest tokens are read from `cache`, a file for each batch.
        precision: in which matrices are multiplied.
    """

    def __init__(
        self,
        student: PuzzleForCausalLM,
        teacher: PuzzleForCausalLM | None,
        cache: Path | None,
        settings: DistilSettings,
        precision: torch.dtype,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self._cache = student, teacher, cache
        self._settings, self._precision = settings, precision

    def forward(self, batch: Batch) -> Losses:
        """The child's losses on a batch; outside training, without gradients, the KL whatever its weight is."""
        settings = self._settings
        with autocast(batch.tokens_BT.device, self._precision):
            hidden_ND, kl, cosine = self._beside_teacher(batch) if self._cache is None else self._from_cache(batch)
            total, kl_mean, _ = head_losses(
                hidden_ND,
                self.student.lm_head.weight,
                kl,
                batch.targets_BT.flatten(),
                kl_weight=settings.kl_weight if torch.is_grad_enabled() else 1.0,
                lm_weight=settings.lm_weight,
                cap=self.student.cap,
            )
        return Losses(total + settings.cosine_weight * cosine, kl_mean, cosine.detach())

    def _beside_teacher(self, batch: Batch) -> tuple[Tensor, KL, Tensor]:
        """Child and parent in lock step: layer i of both, and at once the cosine of what leaves it.

        A layer that is neither attention nor FFN in the child passes on what enters it and has no cosine.
        """
        student, teacher = self.student, self.teacher
        assert teacher is not None
        where: Any = {"attention_mask": _masks(teacher, batch), "position_ids": batch.positions_BT}
        with torch.no_grad():
            parent_BTD = teacher.embed(batch.tokens_BT)
            parent_context = teacher.model.context(parent_BTD, **where)
        child_BTD = student.embed(batch.tokens_BT).to(self._precision)
        context = student.model.context(child_BTD, **where)
        cosines = []
        layers: Any = zip(teacher.model.layers, student.model.layers, strict=True)
        for parent_layer, layer in layers:
            with torch.no_grad():
                parent_BTD = parent_layer(parent_BTD, **parent_context)
            child_BTD = layer(child_BTD, **context)
            if self._settings.cosine_weight and layer.norm_names:
                cosines.append(cosine_loss(child_BTD, parent_BTD))
        with torch.no_grad():
            parent_ND = teacher.final_norm(parent_BTD).flatten(0, 1)
            kl = kl_to_head(parent_ND, teacher.lm_head.weight, teacher.cap)
        cosine = torch.stack(cosines).mean() if cosines else child_BTD.new_zeros(())
        return student.final_norm(child_BTD).flatten(0, 1), kl, cosine

    def _from_cache(self, batch: Batch) -> tuple[Tensor, KL, Tensor]:
        """The child alone; there are no hidden states to compare."""
        assert self._cache is not None
        first = batch.first * batch.tokens_BT.shape[1]
        device, rows = batch.tokens_BT.device, slice(first, first + batch.tokens_BT.numel())
        tensors = read_tensors(self._cache / f"{batch.name}.safetensors")
        ids_NK, logp_NK = (tensors[name][rows].to(device) for name in ("ids_NK", "log_probabilities_NK"))
        masks = _masks(self.student, batch)
        output = self.student.model(batch.tokens_BT, masks, batch.positions_BT, use_cache=False)
        hidden_ND = self.student.divided(output.last_hidden_state).flatten(0, 1)
        return hidden_ND, kl_to_top_tokens(ids_NK.long(), logp_NK), hidden_ND.new_zeros(())


class TopTokens(nn.Module):
    """The parent's `num_tokens` likeliest next tokens."""

    def __init__(self, model: PuzzleForCausalLM, num_tokens: int) -> None:
        super().__init__()
        self.model, self._num_tokens = model, min(num_tokens, model.config.vocab_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        output = self.model.model(batch.tokens_BT, _masks(self.model, batch), batch.positions_BT, use_cache=False)
        operand_VD = float32_operand(self.model.lm_head.weight)
        parts = []
        for rows_ND in self.model.divided(output.last_hidden_state).flatten(0, 1).split(64):  # tokens at once
            logits_NV = capped(float32_product(rows_ND, operand_VD), self.model.cap)
            parts.append(torch.log_softmax(logits_NV, -1).topk(self._num_tokens, -1))
        logp_NK, ids_NK = (torch.cat(each) for each in zip(*parts, strict=True))
        return {"ids_NK": ids_NK.int(), "log_probabilities_NK": logp_NK}


@torch.no_grad()
def fill_cache(folder: Path, top_tokens: TopTokens, batches: Iterable[Batch], total: int) -> None:
    """Write the parent's top tokens of each of `total` whole batches that lacks them; processes take turns."""
    group, read = Group.current(), iter(batches)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("teacher cache", total) as bar:
        while turn := list(islice(read, group.size)):
            batch = turn[min(group.rank, len(turn) - 1)]  # of too few, some repeat what another has
            file = folder / f"{batch.name}.safetensors"
            lacks = not file.exists()
            if group.sum(torch.tensor(float(lacks))):
                tensors = top_tokens(batch)
                if lacks:
                    write_tensors(file, tensors)
            bar.advance(len(turn))
