"""The block library: an index over the trained variants of a space, their weights on disk, and these put to use.

Shapes: A candidates, B batch, T tokens, D hidden size.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.library.rounding import decode, encode_state
from puzzle.library.statistics import Statistics
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, file_digest, lost, read_json, read_parsed, read_tensors, remembered
from puzzle.variants import BlockVariant, State, Subblock, Variant, parse_variant, split_state

Names = tuple[str, ...]
"""An architecture: one block name a layer."""


@dataclass(frozen=True)
class Library:
    """The finished library."""

    root: Path
    """The run folder."""
    address: str
    parent: Parent
    index: LibraryIndex
    statistics: Statistics | None = None
    """By which errors of rounding are weighed, if they are."""

    def state(self, layer: int, variant: Variant) -> State:
        """The weights of a variant of a layer, the parent's own included, in float32; a twin's are rounded."""
        subblock = variant.subblock
        if variant.type:
            state = self.state(layer, variant.untyped)
            moments = {} if self.statistics is None else self.statistics.moments(layer, subblock)
            encoded = encode_state(variant, state, moments, self.parent.config)
            return state | {name: decode(each, variant.type) for name, each in encoded.items()}
        if variant == self.parent.architecture.blocks[layer].subblock(subblock):
            return split_state(self.parent.layer_state(layer), subblock, self.parent.config)
        row = self.index.by_key[layer, subblock, variant.name]
        state = read_tensors(self.root / row.file) if row.file else {}
        if not row.widened_from:
            return state
        widened = parse_variant(subblock, row.widened_from).widen(state, variant, self.parent.config)
        assert widened is not None, f"{row.widened_from} has no form as {variant}"
        return widened

    def block_state(self, layer: int, block: BlockVariant) -> State:
        """The weights of a block: those it was trained with as a whole, else its subblocks'."""
        if (row := self.index.by_key.get((layer, "block", block.name))) is not None:
            return read_tensors(self.root / row.file)
        return self.state(layer, block.attention) | self.state(layer, block.ffn)


class LayerBlocks:
    """Blocks of one layer as modules. They share those of their subblocks, and what these compute; blocks that the
    library has trained as a whole have their own.

    Args:
        model: the parent, for whose context the modules are made; its own layers need no weights.
    """

    def __init__(self, library: Library, layer: int, blocks: Sequence[BlockVariant], model: PuzzleForCausalLM) -> None:
        self.layer, self._model = layer, model
        whole = {block for block in blocks if (layer, "block", block.name) in library.index.by_key}

        @cache
        def module(variant: Variant, block: BlockVariant | None) -> PuzzleDecoderLayer:
            state = library.state(layer, variant) if block is None else library.block_state(layer, block)
            own = split_state(state, variant.subblock, model.config)
            cast_ = {name: own[name].to(model.device, model.dtype) for name in own}
            return variant.build(model.config, cast_, layer)

        self._modules = {
            block: [module(each, block if block in whole else None) for each in block.subblocks] for block in blocks
        }

    @torch.no_grad()
    def outputs(self, blocks: Sequence[BlockVariant], hidden_BTD: Tensor) -> Tensor:
        """The layer's outputs with each of `blocks` in it, [A * B, T, D]."""
        context = self._model.model.context(hidden_BTD[:1])

        @cache
        def attended(attention: PuzzleDecoderLayer) -> Tensor:
            return attention(hidden_BTD, **context)

        return torch.cat([ffn(attended(attention)) for attention, ffn in map(self._modules.__getitem__, blocks)])


@torch.no_grad()
def final_states(
    library: Library, model: PuzzleForCausalLM, architectures: Sequence[Names], batches: Iterable[Tensor]
) -> list[list[Tensor]]:
    """The outputs of the last layer, [B, T, D], for each architecture a list of batches.

    Nothing is assembled: the text goes through one layer at a time, with all blocks in it that are asked for, and
    architectures that begin alike share what they have in common. So the blocks of one layer are in memory at a time.

    Args:
        model: the parent; its layers need no weights. batches: tokens, [B, T].
    """
    states: dict[Names, list[Tensor]] = {(): [model.embed(tokens_BT) for tokens_BT in batches]}
    for layer in range(library.parent.num_layers):
        prefixes = sorted({names[: layer + 1] for names in architectures})
        blocks = {prefix[-1]: BlockVariant.parse(prefix[-1]) for prefix in prefixes}
        modules = LayerBlocks(library, layer, list(blocks.values()), model)
        for begin, together in groupby(prefixes, key=lambda prefix: prefix[:-1]):
            ends = list(together)
            some = [blocks[end[-1]] for end in ends]
            outputs = [modules.outputs(some, state_BTD).chunk(len(some)) for state_BTD in states.pop(begin)]
            states |= zip(ends, map(list, zip(*outputs, strict=True)), strict=True)
    return [states[names] for names in architectures]


def read_index(run: Run, path: Path) -> LibraryIndex | None:
    """The index on disk; None if weights are missing, a `PuzzleError` if some are not what was written."""
    index = read_parsed(path, LibraryIndex.from_json)
    files = sorted({run.path / row.file for row in index.rows if row.file})
    with remembered(run.path / "digests.json") as known:
        for file in filter(Path.exists, files if run.leads else []):
            if file_digest(file, known) != read_json(file.with_suffix(".json"))["weights"]:
                raise lost(file)
    return index if all(file.exists() for file in files) else None


def nested(root: Path, parent: Parent, rows: Sequence[LibraryRow]) -> list[LibraryRow]:
    """Law 4: a variant that ended worse than a narrower one takes over the narrower one's function."""
    variants = [parse_variant(cast(Subblock, row.subblock), row.variant) for row in rows]
    narrower = defaultdict[tuple[int, str], list[LibraryRow]](list)
    result = list(rows)
    for place in sorted(range(len(rows)), key=lambda place: variants[place].num_params(parent.config)):
        row, variant = rows[place], variants[place]
        for narrow in narrower[row.layer, row.subblock]:
            if narrow.file and narrow.loss < row.loss:
                source = parse_variant(variant.subblock, narrow.widened_from or narrow.variant)
                if source.widen(read_tensors(root / narrow.file), variant, parent.config):
                    row = replace(row, file=narrow.file, widened_from=source.name, loss=narrow.loss)
        result[place] = row
        narrower[row.layer, row.subblock].append(row)
    return result
