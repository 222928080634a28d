"""The library's blocks put to use: any number of candidates for a layer, and whole architectures, layer by layer.

Shapes: A candidates, B batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from puzzle.library.library import Library
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.variants import SUBBLOCKS, BlockVariant, State, Variant, split_state

Names = tuple[str, ...]
"""An architecture: one block name a layer."""


class LayerBlocks:
    """Blocks of one layer as modules; they share the modules of their subblocks, and what these compute.

    Blocks that the library has trained as a whole have their own.

    Args:
        model: the parent, for whose context the modules are made; its own layers need no weights.
    """

    def __init__(self, library: Library, layer: int, blocks: Sequence[BlockVariant], model: PuzzleForCausalLM) -> None:
        self.layer, self._model = layer, model
        shared: dict[Variant, PuzzleDecoderLayer] = {}
        self._modules: dict[BlockVariant, list[PuzzleDecoderLayer]] = {}
        for block in blocks:
            variants = [block.subblock(subblock) for subblock in SUBBLOCKS]
            if library.index.find(layer, "block", block.name) is not None:
                state = library.block_state(layer, block)
                self._modules[block] = [self._module(v, split_state(state, v.subblock)) for v in variants]
                continue
            for variant in variants:
                if variant not in shared:
                    shared[variant] = self._module(variant, library.state(layer, variant))
            self._modules[block] = [shared[variant] for variant in variants]

    def _module(self, variant: Variant, state: State) -> PuzzleDecoderLayer:
        cast = {name: tensor.to(self._model.device, self._model.dtype) for name, tensor in state.items()}
        return variant.build(self._model.config, cast)

    @torch.no_grad()
    def outputs(self, blocks: Sequence[BlockVariant], hidden_BTD: Tensor) -> Tensor:
        """The layer's outputs with each of `blocks` in it, [A * B, T, D]."""
        context = self._model.model.context(hidden_BTD)
        attended: dict[PuzzleDecoderLayer, Tensor] = {}
        outputs = []
        for attention, ffn in (self._modules[block] for block in blocks):
            if attention not in attended:
                attended[attention] = attention(hidden_BTD, **context)
            outputs.append(ffn(attended[attention]))
        return torch.cat(outputs)


@torch.no_grad()
def final_states(
    library: Library, model: PuzzleForCausalLM, architectures: Sequence[Names], batches: Iterable[Tensor]
) -> list[list[Tensor]]:
    """The outputs of the last layer, [B, T, D], for each architecture a list of batches.

    Nothing is assembled: the text goes through one layer at a time, with all blocks in it that are asked for, and
    architectures that begin alike share what they have in common. So the blocks of one layer are in memory at a time.

    Args:
        model: the parent; its layers need no weights.
        batches: tokens, [B, T].
    """
    states: dict[Names, list[Tensor]] = {(): [model.embed(tokens_BT) for tokens_BT in batches]}
    for layer in range(len(library.parent.architecture.blocks)):
        prefixes = sorted({names[: layer + 1] for names in architectures})
        blocks = {name: BlockVariant.parse(name) for name in dict.fromkeys(prefix[-1] for prefix in prefixes)}
        modules = LayerBlocks(library, layer, list(blocks.values()), model)
        for begin, together in groupby(prefixes, key=lambda prefix: prefix[:-1]):
            ends = list(together)
            some = [blocks[end[-1]] for end in ends]
            outputs = [modules.outputs(some, state_BTD).chunk(len(some)) for state_BTD in states.pop(begin)]
            states |= zip(ends, map(list, zip(*outputs, strict=True)), strict=True)
    return [states[names] for names in architectures]
