"""What the models read in each step: packed sequences, and each token's position in its document.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from puzzle.data import RangeName, TokenData
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.recipe import DistilSettings


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

    def share(self, group: Group, device: torch.device) -> "Batch":
        """The sequences that one of several processes runs, as many in each where their number divides the batch's."""
        size = len(self.tokens_BT)
        first, end = (size * rank // group.size for rank in (group.rank, group.rank + 1))
        rows = slice(first, end) if first < end else slice(0, 1)
        return replace(
            self,
            tokens_BT=self.tokens_BT[rows].to(device),
            targets_BT=self.targets_BT[rows].to(device),
            positions_BT=None if self.positions_BT is None else self.positions_BT[rows].to(device),
            first=rows.start,
            counted=int(first < end),
        )


class Batches:
    """The training and validation text of one distillation, by step."""

    def __init__(self, data: TokenData, settings: DistilSettings, seed: int) -> None:
        self._data, self._settings, self._seed = data, settings, seed
        self._size, processes = settings.batch_size // settings.accumulate, Group.current().size
        if self._size % processes:
            fitting = ", ".join(str(count) for count in range(1, self._size + 1) if self._size % count == 0)
            raise PuzzleError(
                f"distil.batch_size: {settings.batch_size} sequences, in parts of {self._size} (distil.accumulate), "
                f"cannot be shared evenly by {processes} processes; start {fitting} of them, or change these settings"
            )
        self.tokens_per_step = settings.batch_size * data.sequence_length
        self.steps = math.ceil(settings.tokens / self.tokens_per_step)

    def training(self, step: int) -> Iterator[Batch]:
        """The step's batches, of as many sequences each."""
        indices = self._data.training_indices(step, self._settings.batch_size, self._seed)
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

    def _batch(self, name: str, source: RangeName, indices: Sequence[int] | NDArray[int64]) -> Batch:
        sequences = self._data.sequences(source, indices)
        positions_BT = self._data.positions(source, indices)[:, :-1] if self._settings.documents else None
        return Batch(name, sequences[:, :-1], sequences[:, 1:], positions_BT)
