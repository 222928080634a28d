"""Blocks of one layer scored by suffix recomputation: their subblocks, the parent's layers after them, and the head.

The inputs of a layer are on disk for all scoring text, so that a candidate costs its own block and the layers after it,
not the whole model (law 9: the same as a full forward). Of a streamed parent the layers after the block are held a few
at a time, for as much text as the candidates' states then leave room for.

Shapes: A candidate blocks, B sequences a batch, T tokens, D hidden size, N = B * T, n sequences, M metrics.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.device import tokens_at_once
from puzzle.library import LayerBlocks
from puzzle.metrics import TokenMetrics, compare
from puzzle.recipe import ScoreSettings
from puzzle.streams import Stream
from puzzle.variants import BlockVariant

METRICS = ("kl", "lm_loss", "top1_agreement", "cosine")
"""Per-sequence means, the columns of [n, M]."""
_BATCH_TOKENS = 2048
"""Of a batch of text on disk: longer ones save nothing, and all candidates of a layer have a state for each token."""
_MIN_SHARE = 4
"""Sequences at least of the share for composed blocks: fewer say nothing of their own spread."""


@dataclass(frozen=True)
class ScoringText:
    """The scoring text in batches of whole sequences."""

    data: TokenData
    batches: tuple[slice, ...]
    share: range
    """The batches for all blocks; `rest`: those after them, for blocks with one subblock replaced alone."""
    rest: range

    @classmethod
    def cut(cls, data: TokenData, settings: ScoreSettings) -> "ScoringText":
        count = num_sequences(data, settings)
        share = max(_MIN_SHARE, math.ceil((settings.composed_share or 1.0) * count))
        share = share if count >= 2 * _MIN_SHARE and share < count else count
        size = max(1, _BATCH_TOKENS // data.sequence_length)
        first = [slice(start, min(start + size, share)) for start in range(0, share, size)]
        rest = [slice(start, min(start + size, count)) for start in range(share, count, size)]
        return cls(data, (*first, *rest), range(len(first)), range(len(first), len(first) + len(rest)))

    def tokens(self, batch: int) -> Tensor:
        """Inputs and the last target, [B, T + 1]."""
        return self.data.sequences("scoring", self.batches[batch])

    def inputs(self) -> Iterator[Tensor]:
        return (self.tokens(batch)[:, :-1] for batch in range(len(self.batches)))

    def state_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Of a layer's output for the longest batch."""
        sequences = max(batch.stop - batch.start for batch in self.batches)
        return sequences * self.data.sequence_length * hidden_size * dtype.itemsize


def num_sequences(data: TokenData, settings: ScoreSettings) -> int:
    """Sequences that blocks are scored on."""
    return min(math.ceil(settings.tokens / data.sequence_length), data.num_sequences("scoring"))


class SuffixScorer:
    """Scores blocks on batches of a text, prepared to the end as `final`, to the blocks' layer as `scoring`."""

    def __init__(self, stream: Stream, text: ScoringText) -> None:
        self._stream, self._text, self._model = stream, text, stream.model

    def parent(self) -> Tensor:
        """The parent's own metrics, [n, M]."""
        batches = range(len(self._text.batches))
        return torch.cat([self._metrics(batch, self._final(batch))[0] for batch in batches])

    def blocks(
        self, modules: LayerBlocks, blocks: Sequence[BlockVariant], batches: range
    ) -> dict[BlockVariant, Tensor]:
        """The metrics of each of the blocks, [n, M]."""
        if not blocks or not batches:
            return {}
        parts = []
        suffix = range(modules.layer + 1, self._stream.num_layers)
        states_room = max(0, self._stream.room(()) // 2)
        state_bytes = self._text.state_bytes(self._model.config.hidden_size, self._model.dtype)
        # Every layer is in memory, or is read again for each round of batches.
        at_once = 1 if self._stream.resident else max(1, states_room // (len(blocks) * state_bytes))
        for first in range(batches.start, batches.stop, at_once):
            together = range(first, min(first + at_once, batches.stop))
            states = [modules.outputs(blocks, self._inputs("scoring", modules.layer, batch)) for batch in together]
            for layers in self._stream.walk(suffix, states_room):
                for state_BTD in states:
                    self._through(layers, state_BTD)
            parts += [self._metrics(batch, state_BTD) for batch, state_BTD in zip(together, states, strict=True)]
        return dict(zip(blocks, torch.cat(parts, dim=1), strict=True))

    def _inputs(self, text: str, layer: int, batch: int) -> Tensor:
        return self._stream.inputs(layer, text, (batch, self._text.tokens(batch)[:, :-1]))

    def _final(self, batch: int) -> Tensor:
        return self._inputs("final", self._stream.num_layers, batch)

    def _through(self, layers: range, hidden_BTD: Tensor) -> None:
        """Overwrite the states by the outputs of the last of these layers, as many tokens at once as suit it."""
        sequences = max(1, tokens_at_once(hidden_BTD.device) // hidden_BTD.shape[1])
        for part_BTD in hidden_BTD.split(sequences):
            part_BTD.copy_(self._stream.forward(layers, part_BTD))

    def _metrics(self, batch: int, states_BTD: Tensor) -> Tensor:
        """Of candidates whose final states follow one another in [A * B, T, D], [A, B, M]."""
        final_BTD, tokens_BT = self._final(batch), self._text.tokens(batch).to(states_BTD.device)
        finals_AND = states_BTD.unflatten(0, (-1, len(final_BTD))).flatten(1, 2)
        metrics = compare(self._model, self._model, final_BTD.flatten(0, 1), finals_AND, tokens_BT[:, 1:].flatten())
        return per_sequence(metrics, len(final_BTD))


def per_sequence(metrics: TokenMetrics, batch_size: int) -> Tensor:
    """Means over each sequence's tokens, [A, B, M], on the CPU."""
    columns = [getattr(metrics, name).double().unflatten(1, (batch_size, -1)).mean(2) for name in METRICS]
    return torch.stack(columns, dim=2).cpu()
