"""Packed tokens on disk, read by sequence; where documents end in them; and the order in which training takes them.

    calibration.bin, training.bin, ...   little-endian uint32 of shape [sequences, T + 1], one file a range
    calibration.ends.bin, ...            int64 [documents], where each document ends in the range, in tokens
    manifest.json                        every range's number of documents and of sequences

T is the recipe's `data.sequence_length`: a sequence of T + 1 tokens gives T inputs and T targets.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RangeName = Literal["calibration", "training", "validation", "scoring", "test"]
RANGES: tuple[RangeName, ...] = get_args(RangeName)
"""Disjoint by document: documents with the same text are in the same range."""
Indices = Sequence[int] | NDArray[np.int64] | slice
TOKEN_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class TokenData:
    """The packed tokens of every range, memory-mapped."""

    path: Path
    address: str
    sequence_length: int
    """T, tokens of input a sequence."""
    counts: Mapping[RangeName, int]
    """Sequences of each range; tokens at its end that fill none are left out."""

    def num_sequences(self, range: RangeName, tokens: int | None = None) -> int:
        """All of a range; with `tokens`, its first ceil(tokens / T) sequences, or all there are."""
        count = self.counts[range]
        return count if tokens is None else min(-(-tokens // self.sequence_length), count)

    def sequences(self, range: RangeName, indices: Indices) -> Tensor:
        """Sequences of a range as int64 `[n, T + 1]`: inputs are `[:, :-1]`, targets `[:, 1:]`."""
        wanted = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        file, shape = self.path / f"{range}.bin", (self.num_sequences(range), self.sequence_length + 1)
        # Mapped anew each time: that takes 0.05 ms, and there is nothing to keep open.
        return torch.from_numpy(np.memmap(file, TOKEN_DTYPE, "r", shape=shape)[wanted].astype(np.int64))

    def batches(self, range: RangeName, batch_size: int, tokens: int) -> Iterator[Tensor]:
        """The first ceil(tokens / T) sequences of a range in order, or all there are; the last batch may be smaller."""
        count = self.num_sequences(range, tokens)
        for start in np.arange(0, count, batch_size):
            yield self.sequences(range, slice(start, min(start + batch_size, count)))

    def inputs(self, range: RangeName, batch_size: int, tokens: int) -> Iterator[Tensor]:
        """The same without the last targets, `[n, T]`."""
        return (sequences[:, :-1] for sequences in self.batches(range, batch_size, tokens))

    def training_batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The global batch of a step, int64 `[batch_size, T + 1]`."""
        return self.sequences("training", self.training_indices(step, batch_size, seed))

    def training_indices(self, step: int, batch_size: int, seed: int) -> NDArray[np.int64]:
        """The sequences of a step's global batch: every epoch takes all of them in an order of its own.

        Sample i of a training is the same however its batches are cut into steps and processes.
        """
        n = self.num_sequences("training")
        epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
        return np.concatenate([order(seed, int(epoch), n)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def positions(self, range: RangeName, indices: Indices) -> Tensor:
        """Each token's position in its document, or in the sequence if that begins later, as int64 `[n, T + 1]`."""
        wanted = np.arange(self.num_sequences(range))[indices]
        ends = np.memmap(self.path / f"{range}.ends.bin", np.int64, "r")
        length = self.sequence_length + 1
        begins_BT = np.zeros((len(wanted), length), dtype=np.int64)
        for begins_T, first in zip(begins_BT, wanted * length, strict=True):
            inside = ends[slice(*np.searchsorted(ends, [first, first + length]))] - first
            begins_T[inside] = inside
        return torch.from_numpy(np.arange(length) - np.maximum.accumulate(begins_BT, axis=1))


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation of `n` sequences in an epoch: ranks of raw Philox words, which no version of numpy may change."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    positions: NDArray[np.int64] = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    positions.setflags(write=False)
    return positions


def write_at(file: Path, start: int, data: bytes) -> None:
    """Write `data` from byte `start` on, as the end of the file: what a start that was cut off left is overwritten."""
    with file.open("r+b" if file.exists() else "wb") as handle:
        handle.truncate(start)
        handle.seek(start)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
