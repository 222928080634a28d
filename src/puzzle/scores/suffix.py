"""Blocks of one layer scored by suffix recomputation: their subblocks, the parent's layers after them, and the head.

What enters a layer is on disk for all scoring text (`ParentPasses`), so a candidate costs its own block and the layers
after it, not the whole model (law 9: the same as a full forward). A parent that does not fit in memory has the layers
after the block in use a few at a time, for as much text as the candidates' states then leave room for.

Shapes: A candidate blocks, B sequences a batch, T tokens, D hidden size, n sequences, M metrics.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.metrics import TokenMetrics, compare
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import ParentPasses
from puzzle.runs import Run
from puzzle.variants import SUBBLOCKS, BlockVariant, Variant, build_subblock, split_state

METRICS = ("kl", "lm_loss", "top1_agreement", "cosine")
"""Per-sequence means, the columns of [n, M]."""
_BATCH_TOKENS = 2048
"""Of a batch of text on disk: longer ones save nothing, and all candidates of a layer have a state for each token."""
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16_384}
"""Through the suffix: 512 stay in a CPU's cache, 4096 took 30 % longer (192 wide, one core of an EPYC, 2026-11-21)."""


@dataclass(frozen=True)
class ScoringText:
    """The scoring text in batches of whole sequences; `rounds` are the indices of the batches of each round."""

    data: TokenData
    batches: tuple[slice, ...]
    rounds: tuple[range, ...]

    @classmethod
    def cut(cls, data: TokenData, rounds: Sequence[int]) -> "ScoringText":
        """Rounds of so many sequences, one after another."""
        size = max(1, _BATCH_TOKENS // data.sequence_length)
        batches: list[slice] = []
        ranges = []
        start = 0
        for count in rounds:
            first, stop = len(batches), start + count
            batches += [slice(each, min(each + size, stop)) for each in range(start, stop, size)]
            ranges.append(range(first, len(batches)))
            start = stop
        return cls(data, tuple(batches), tuple(ranges))

    def tokens(self, batch: int) -> Tensor:
        """Inputs and the last target, [B, T + 1]."""
        return self.data.sequences("scoring", self.batches[batch])

    def inputs(self) -> Iterator[Tensor]:
        for batch in range(len(self.batches)):
            yield self.tokens(batch)[:, :-1]

    def state_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Of what leaves a layer for the longest batch."""
        sequences = max(batch.stop - batch.start for batch in self.batches)
        return sequences * self.data.sequence_length * hidden_size * dtype.itemsize


class LayerBlocks:
    """The blocks of one layer as modules; blocks share the modules of their subblocks, and what these compute.

    Blocks that the library has trained as a whole have their own.
    """

    def __init__(self, library: Library, layer: int, blocks: Sequence[BlockVariant], model: PuzzleForCausalLM) -> None:
        self.layer = layer
        self._model = model
        own = {block for block in blocks if library.index.find(layer, "block", block.name) is not None}
        subblocks = {
            variant: self._module(variant, library.state(layer, variant))
            for variant in dict.fromkeys(
                block.subblock(subblock) for subblock in SUBBLOCKS for block in blocks if block not in own
            )
        }
        self._modules = {
            block: (subblocks[block.attention], subblocks[block.ffn]) for block in blocks if block not in own
        }
        for block in own:
            state = library.block_state(layer, block)
            attention = self._module(block.attention, split_state(state, "attention"))
            self._modules[block] = attention, self._module(block.ffn, split_state(state, "ffn"))

    def _module(self, variant: Variant, state: dict[str, Tensor]) -> PuzzleDecoderLayer:
        cast = {name: tensor.to(self._model.device, self._model.dtype) for name, tensor in state.items()}
        return build_subblock(variant, self._model.config, cast)

    def outputs(self, blocks: Sequence[BlockVariant], entered_BTD: Tensor) -> Tensor:
        """What leaves the layer with each of `blocks` in it, [A * B, T, D]."""
        context = self._model.model.context(entered_BTD)
        attended: dict[PuzzleDecoderLayer, Tensor] = {}
        outputs = []
        for block in blocks:
            attention, ffn = self._modules[block]
            if attention not in attended:
                attended[attention] = attention(entered_BTD, **context)
            outputs.append(ffn(attended[attention]))
        return torch.cat(outputs)


class SuffixScorer:
    """Scores blocks on batches of a text.

    That must be prepared in `passes`: for the blocks' layer under the name `scoring`, to the end as `final`.
    """

    def __init__(self, run: Run, passes: ParentPasses, text: ScoringText) -> None:
        self._run, self._passes, self._text = run, passes, text
        self._model = passes.model
        self._num_layers = len(passes.layer_bytes)

    def parent(self, batches: range) -> Tensor:
        """The parent's own metrics, [n, M]."""
        finals = ((batch, self._final(batch)) for batch in batches)
        return torch.cat([self._metrics(batch, final_BTD)[0] for batch, final_BTD in finals])

    def blocks(
        self, layer_blocks: LayerBlocks, blocks: Sequence[BlockVariant], batches: range
    ) -> dict[BlockVariant, Tensor]:
        """The metrics of each of the blocks, [n, M]."""
        if not blocks:
            return {}
        parts: list[list[Tensor]] = []
        suffix = range(layer_blocks.layer + 1, self._num_layers)
        at_once = self._batches_at_once(len(blocks))
        for first in range(batches.start, batches.stop, at_once):
            together = range(first, min(first + at_once, batches.stop))
            states = [layer_blocks.outputs(blocks, self._entering(layer_blocks.layer, batch)) for batch in together]
            for group in self._passes.groups(suffix, self._extra_bytes):
                self._passes.hold(group)
                for state_BTD in states:
                    self._through(group, state_BTD)
            parts += [self._metrics(batch, state_BTD) for batch, state_BTD in zip(together, states, strict=True)]
        return {block: torch.cat(columns) for block, columns in zip(blocks, zip(*parts, strict=True), strict=True)}

    def _extra_bytes(self, layer: int) -> int:
        """A streamed layer takes room twice, so that half the memory is left to the candidates' states."""
        return 0 if self._passes.resident else self._passes.layer_bytes[layer]

    def _batches_at_once(self, num_blocks: int) -> int:
        """One where every layer is in memory, as many as fit where each batch has the layers read again."""
        if self._passes.resident:
            return 1
        state_bytes = self._text.state_bytes(self._model.config.hidden_size, self._model.dtype)
        return max(1, self._run.memory_bytes // 2 // (num_blocks * state_bytes))

    def _entering(self, layer: int, batch: int) -> Tensor:
        return self._passes.entering(layer, "scoring", batch, self._text.tokens(batch)[:, :-1])

    def _final(self, batch: int) -> Tensor:
        return self._passes.entering(self._num_layers, "final", batch, self._text.tokens(batch)[:, :-1])

    def _through(self, layers: range, hidden_BTD: Tensor) -> None:
        """Overwrite the states by what leaves the last of these layers, as many tokens at once as suits the device."""
        at_once = max(1, _TOKENS_AT_ONCE.get(hidden_BTD.device.type, _BATCH_TOKENS) // hidden_BTD.shape[1])
        for part_BTD in hidden_BTD.split(at_once):
            context = self._model.model.context(part_BTD)
            left_BTD = part_BTD
            for layer in layers:
                left_BTD = self._model.model.layers[layer](left_BTD, **context)
            part_BTD.copy_(left_BTD)

    def _metrics(self, batch: int, states_BTD: Tensor) -> list[Tensor]:
        """Of each candidate, whose final states follow one another in [A * B, T, D], its sequences' metrics, [B, M]."""
        final_BTD, tokens_BT = self._final(batch), self._text.tokens(batch).to(states_BTD.device)
        finals_ND = [final.flatten(0, 1) for final in states_BTD.split(len(final_BTD))]
        targets_N = tokens_BT[:, 1:].flatten()
        metrics = compare(self._model, self._model, final_BTD.flatten(0, 1), finals_ND, targets_N)
        return [per_sequence(each, len(final_BTD)) for each in metrics]


def per_sequence(metrics: TokenMetrics, batch_size: int) -> Tensor:
    """Means over each sequence's tokens, [B, M]."""
    columns = [getattr(metrics, name).double().unflatten(0, (batch_size, -1)).mean(1) for name in METRICS]
    return torch.stack(columns, dim=1).cpu()
