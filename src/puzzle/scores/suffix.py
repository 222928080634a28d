"""Blocks of one layer scored by suffix recomputation: their subblocks, the parent's layers after them, and the head.

The inputs of a layer are on disk for all scoring text, so that a candidate costs its own block and the layers after it,
not the whole model (law 9: the same as a full forward). Of a streamed parent the layers after the block are held a few
at a time, for as much text as the candidates' states then leave room for.

Shapes: A candidate blocks, B sequences a batch, T tokens, D hidden size, N = B * T, n sequences, M metrics.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.device import tokens_at_once
from puzzle.library import LayerBlocks
from puzzle.metrics import compare
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.recipe import ScoreSettings
from puzzle.streams import Stream
from puzzle.variants import BlockVariant

METRICS = ("kl", "lm_loss", "top1_agreement", "cosine")
"""Per-sequence means, the columns of [n, M]."""
KL = METRICS.index("kl")
_BATCH_TOKENS = 2048
"""Of a batch of text on disk: longer ones save nothing, and all candidates of a layer have a state for each token."""
_MIN_SHARE = 4
"""Sequences at least of the share for composed blocks: fewer say nothing of their own spread."""


def state_bytes(data: TokenData, config: PuzzleConfig, dtype: torch.dtype) -> int:
    """Of a layer's output for a batch."""
    return max(_BATCH_TOKENS, data.sequence_length) * config.hidden_size * dtype.itemsize


class SuffixScorer:
    """Scores blocks on batches of a text, prepared to the end as `final`, to the blocks' layer as `scoring`."""

    def __init__(self, stream: Stream, data: TokenData, settings: ScoreSettings) -> None:
        self._stream, self._data, self._model = stream, data, stream.model
        count = data.num_sequences("scoring", settings.tokens)
        share = max(_MIN_SHARE, math.ceil((settings.composed_share or 1.0) * count))
        share = share if count >= 2 * _MIN_SHARE and share < count else count
        size = max(1, _BATCH_TOKENS // data.sequence_length)
        first, rest = (
            [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
            for start, stop in ((0, share), (share, count))
        )
        self._batches = first + rest
        self.shared, self.rest = range(len(first)), range(len(first), len(self._batches))
        """The batches that all blocks are scored on, and those for blocks with one subblock replaced alone."""

    def inputs(self) -> Iterator[Tensor]:
        """The text, [B, T]."""
        return (self._tokens(batch)[:, :-1] for batch in range(len(self._batches)))

    def parent(self) -> Tensor:
        """The parent's own metrics, [n, M]."""
        batches = range(len(self._batches))
        return torch.cat([self._metrics(batch, self._hidden("final", batch))[0] for batch in batches])

    def blocks(
        self, modules: LayerBlocks, blocks: Sequence[BlockVariant], batches: range
    ) -> dict[BlockVariant, Tensor]:
        """The metrics of each of the blocks, [n, M]."""
        if not blocks or not batches:
            return {}
        parts = []
        states_room = max(0, self._stream.room(()) // 2)
        batch_bytes = len(blocks) * state_bytes(self._data, self._model.config, self._model.dtype)
        # Every layer is in memory, or is read again for each round of batches.
        at_once = 1 if self._stream.resident else max(1, states_room // batch_bytes)
        for first in range(batches.start, batches.stop, at_once):
            together = range(first, min(first + at_once, batches.stop))
            states = [modules.outputs(blocks, self._hidden("scoring", batch, modules.layer)) for batch in together]
            for layers in self._stream.walk(range(modules.layer + 1, self._stream.num_layers), states_room):
                for state_BTD in states:
                    self._through(layers, state_BTD)
            parts += [self._metrics(batch, state_BTD) for batch, state_BTD in zip(together, states, strict=True)]
        return dict(zip(blocks, torch.cat(parts, dim=1), strict=True))

    def _tokens(self, batch: int) -> Tensor:
        """Inputs and the last target, [B, T + 1]."""
        return self._data.sequences("scoring", self._batches[batch])

    def _hidden(self, text: str, batch: int, layer: int | None = None) -> Tensor:
        """What enters a layer, or leaves the last one, [B, T, D]."""
        layer = self._stream.num_layers if layer is None else layer
        return self._stream.inputs(layer, text, (batch, self._tokens(batch)[:, :-1]))

    def _through(self, layers: range, hidden_BTD: Tensor) -> None:
        """Overwrite the states by the outputs of the last of these layers, as many tokens at once as suit it."""
        sequences = max(1, tokens_at_once(hidden_BTD.device) // hidden_BTD.shape[1])
        for part_BTD in hidden_BTD.split(sequences):
            part_BTD.copy_(self._stream.forward(layers, part_BTD))

    def _metrics(self, batch: int, states_BTD: Tensor) -> Tensor:
        """Of candidates whose final states follow one another in [A * B, T, D], [A, B, M]."""
        final_BTD = self._hidden("final", batch)
        return per_sequence(self._model, final_BTD, states_BTD.unflatten(0, (-1, len(final_BTD))), self._tokens(batch))


def per_sequence(model: PuzzleForCausalLM, parent_BTD: Tensor, states_ABTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Metrics of final states beside the parent's, means over each sequence's tokens, [A, B, M], on the CPU.

    Args:
        model: the parent, for its final norm and head.
        tokens_BT: inputs and the last target, [B, T + 1].
    """
    targets_N = tokens_BT[:, 1:].flatten().to(states_ABTD.device)
    metrics = compare(model, model, parent_BTD.flatten(0, 1), states_ABTD.flatten(1, 2), targets_N)
    columns = [getattr(metrics, name).double().unflatten(1, (len(tokens_BT), -1)).mean(2) for name in METRICS]
    return torch.stack(columns, dim=2).cpu()


def variance_of_mean(values: Tensor) -> float:
    return float(values.var() / len(values)) if len(values) > 1 else 0.0
