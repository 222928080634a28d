"""What the models read in each step: packed sequences, their documents kept apart, cut short while a ladder says so.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

_SAMPLED_SEQUENCES = 1000
_ENDS_PER_DOCUMENT = 1.5
"""Conversations whose turns end with EOS have two or more; ordinary text has one, but for chance in a sample."""


@dataclass(frozen=True)
class Batch:
    """Sequences that are run at once."""

    name: str
    """Such as `training000012`: no other batch of the training has it."""
    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None
    """In its own document, where documents are kept apart: models attend within stretches of rising positions."""
    first: int = 0
    """Of a share: where its sequences begin in the whole batch."""
    counted: int = 1
    """0 of a share that stands in for an empty one, since no process may leave out a forward."""

    @property
    def num_tokens(self) -> int:
        """Tokens that count in means."""
        return self.counted * self.tokens_BT.numel()

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor_BT: tensor_BT.to(device))

    def share(self, group: Group) -> "Batch":
        """The sequences that one of several processes runs; as many in each where their number divides the batch's."""
        size = len(self.tokens_BT)
        first, end = (size * rank // group.size for rank in (group.rank, group.rank + 1))
        if first == end:
            return replace(self._map(lambda tensor_BT: tensor_BT[:1]), counted=0)
        return replace(self._map(lambda tensor_BT: tensor_BT[first:end]), first=first)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        positions_BT = None if self.positions_BT is None else change(self.positions_BT)
        return replace(
            self, tokens_BT=change(self.tokens_BT), targets_BT=change(self.targets_BT), positions_BT=positions_BT
        )


@dataclass(frozen=True)
class Boundary:
    """Where a document begins in packed text: after `eos`, and at a `bos` if documents start with one."""

    eos: int
    bos: int | None = None

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Each token's place in its document, as far as the sequence shows it, [B, T]."""
        begins_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        begins_BT[:, 1:] = tokens_BT[:, :-1] == self.eos
        if self.bos is not None:
            begins_BT &= tokens_BT == self.bos
        index_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        return index_BT - torch.where(begins_BT, index_BT, 0).cummax(-1).values


def find_boundary(run: Run, parent: Parent, data: TokenData) -> Boundary | None:
    """What tells documents apart in this text; None, with a line in the log, where nothing does.

    Text is packed with EOS after every document. Where documents start with BOS, both together are the boundary. Where
    they do not, EOS alone is, unless it also ends the turns of conversations.
    """
    tokenizer = parent.tokenizer()
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    sample = data.sequences("validation", slice(0, _SAMPLED_SEQUENCES))
    if bos is not None and int(sample[0, 0]) == bos:
        return Boundary(eos, bos)
    counts = data.counts["validation"]
    expected = counts.documents * len(sample) / counts.sequences
    if int((sample == eos).sum()) <= _ENDS_PER_DOCUMENT * expected + 1:
        return Boundary(eos)
    run.log_warning("distil.documents: EOS also stands within documents, so tokens attend across them")
    return None


class Batches:
    """The training and validation text of one distillation, by step."""

    def __init__(self, data: TokenData, settings: DistilSettings, seed: int, boundary: Boundary | None) -> None:
        self._data, self._settings, self._seed, self._boundary = data, settings, seed, boundary
        sequences, size = settings.batch_size // settings.accumulate, Group.current().size
        if sequences % size:
            fitting = ", ".join(str(count) for count in range(1, sequences + 1) if sequences % count == 0)
            raise PuzzleError(
                f"distil.batch_size: {settings.batch_size} sequences, in parts of {sequences} (distil.accumulate), "
                f"cannot be shared evenly by {size} processes; start {fitting} of them, or change these settings"
            )
        self.tokens_per_step = settings.batch_size * data.sequence_length
        self.steps = math.ceil(settings.tokens / self.tokens_per_step)
        if settings.ladder and data.sequence_length % 4:
            raise PuzzleError(
                f"distil.ladder: data.sequence_length {data.sequence_length} cannot be cut into four; "
                "make it a multiple of 4, or set the ladder to 0"
            )

    def pieces(self, step: int) -> int:
        """Into how many pieces the step's sequences are cut."""
        rung = round(self._settings.ladder * self.steps)
        return 4 if step < rung else 2 if step < 2 * rung else 1

    def training(self, step: int) -> Iterator[Batch]:
        """The step's batches, of as many tokens each."""
        sequences = self._data.training_batch(step, self._settings.batch_size, self._seed)
        parts = sequences.chunk(self._settings.accumulate)
        for index, part in enumerate(parts, step * len(parts)):
            yield self._batch(f"training{index:06d}", part, self.pieces(step))

    def validation(self) -> Iterator[Batch]:
        """Held-out text, in whole sequences; the last batch may be smaller."""
        size = self._settings.batch_size // self._settings.accumulate
        for index, sequences in enumerate(self._data.batches("validation", size, self._settings.validation_tokens)):
            yield self._batch(f"validation{index:06d}", sequences, 1)

    def _batch(self, name: str, sequences: Tensor, pieces: int) -> Batch:
        length = self._data.sequence_length // pieces
        tokens_BT, targets_BT = (part.reshape(-1, length) for part in (sequences[:, :-1], sequences[:, 1:]))
        positions_BT = None if self._boundary is None else self._boundary.positions(tokens_BT)
        return Batch(name, tokens_BT, targets_BT, positions_BT)
