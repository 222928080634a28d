"""The block library: an index over the trained variants of a space, their weights on disk, and these put to use.

Law 4, wider is not worse, is a property of the index: where a narrower variant ended better, the wider one takes over
its function.

Shapes: A candidates, B batch, T tokens, D hidden size.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library.bld import StudentPlan, train_students
from puzzle.library.statistics import Statistics
from puzzle.library.students import Student
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, read_parsed, read_tensors, write_json, write_text
from puzzle.stages import LIBRARY, SPACE
from puzzle.variants import (
    BlockVariant,
    LayerSpace,
    Space,
    Start,
    State,
    Subblock,
    Variant,
    expected_losses,
    parse_variant,
    prune_space,
    split_state,
)

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

    def state(self, layer: int, variant: Variant) -> State:
        """The weights of a variant of a layer, the parent's own included, in float32."""
        subblock = variant.subblock
        if variant == self.parent.architecture.blocks[layer].subblock(subblock):
            return split_state(self.parent.layer_state(layer), subblock)
        row = self.index.by_key[layer, subblock, variant.name]
        state = read_tensors(self.root / row.file) if row.file else {}
        if not row.widened_from:
            return state
        widened = parse_variant(subblock, row.widened_from).widen(state, variant, self.parent.config)
        assert widened is not None, f"{row.widened_from} has no form as {variant}"
        return widened

    def block_state(self, layer: int, block: BlockVariant) -> State:
        """The weights of a block: those it was trained with as a whole, else its subblocks'."""
        row = self.index.by_key.get((layer, "block", block.name))
        if row is not None:
            return read_tensors(self.root / row.file)
        return self.state(layer, block.attention) | self.state(layer, block.ffn)

    def sources(self, layer: int, block: BlockVariant) -> list[list[str]]:
        """What the subblocks of a block are made of: their files, and the variants that are widened."""
        rows = [self.index.by_key.get((layer, variant.subblock, variant.name)) for variant in block.subblocks]
        return [[row.file, row.widened_from] for row in rows if row is not None]


class LayerBlocks:
    """Blocks of one layer as modules; they share the modules of their subblocks, and what these compute.

    Blocks that the library has trained as a whole have their own.

    Args:
        model: the parent, for whose context the modules are made; its own layers need no weights.
    """

    def __init__(self, library: Library, layer: int, blocks: Sequence[BlockVariant], model: PuzzleForCausalLM) -> None:
        self.layer, self._model = layer, model
        modules: dict[tuple[Variant, BlockVariant | None], PuzzleDecoderLayer] = {}
        self._modules: dict[BlockVariant, list[PuzzleDecoderLayer]] = {}
        for block in blocks:
            whole = None if library.index.by_key.get((layer, "block", block.name)) is None else block
            for variant in block.subblocks:
                if (variant, whole) not in modules:
                    state = library.state(layer, variant) if whole is None else library.block_state(layer, block)
                    own = split_state(state, variant.subblock)
                    moved = {name: tensor.to(model.device, model.dtype) for name, tensor in own.items()}
                    modules[variant, whole] = variant.build(model.config, moved)
            self._modules[block] = [modules[variant, whole] for variant in block.subblocks]

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
    for layer in range(library.parent.num_layers):
        prefixes = sorted({names[: layer + 1] for names in architectures})
        blocks = {name: BlockVariant.parse(name) for name in dict.fromkeys(prefix[-1] for prefix in prefixes)}
        modules = LayerBlocks(library, layer, list(blocks.values()), model)
        for begin, together in groupby(prefixes, key=lambda prefix: prefix[:-1]):
            ends = list(together)
            some = [blocks[end[-1]] for end in ends]
            outputs = [modules.outputs(some, state_BTD).chunk(len(some)) for state_BTD in states.pop(begin)]
            states |= zip(ends, map(list, zip(*outputs, strict=True)), strict=True)
    return [states[names] for names in architectures]


def build_library(
    run: Run, parent: Parent, data: TokenData, statistics: Statistics, space: Space, *, coupled: bool = False
) -> Library:
    """Initialise and train all variants that `space` names beside the parent's own.

    Args:
        coupled: also train every block composed of them as a whole (paper section 2.2).
    """
    subblocks = build_library(run, parent, data, statistics, space) if coupled else None
    made = {"parent": parent, "data": data, "statistics": statistics, "space": variant_names(space), "coupled": coupled}
    stage = run.open(LIBRARY, **made)
    index_file = stage.path / "index.json"
    if not stage.done:
        identity = read_json(stage.path / "stage.json")  # of each student: the stage's, whatever else there is to train
        for name in ("space", "coupled"):
            del identity["inputs"][name]
        make_plans = partial(student_plans, run, parent, statistics, space, subblocks, identity)
        plans, layers = make_plans(), range(parent.num_layers)
        costs = [1.0 + sum(plan.num_params for plan in plans if plan.layer == layer) for layer in layers]
        for_layers(run, stage, partial(train_students, run, parent, data, make_plans), costs)
        rows = [row for plan in plans if (row := plan.result(run.path)) is not None]
        assert len(rows) == len(plans), "every student is trained"
        rows = _nested(run.path, parent, rows) if subblocks is None else [*subblocks.index.rows, *rows]
        write_text(index_file, LibraryIndex(rows=tuple(rows)).to_json())
        stage.commit(variants=len(rows))
    return Library(run.path, stage.address, parent, read_parsed(index_file, LibraryIndex.from_json))


def student_plans(
    run: Run, parent: Parent, statistics: Statistics, space: Space, subblocks: Library | None, identity: Any
) -> list[StudentPlan]:
    """Of every variant beside the parent's own; or of every block composed of them that has weights.

    Args:
        subblocks: what whole blocks start from; None: subblocks are trained.
        identity: what all students follow from.
    """
    settings, config = run.recipe.library, parent.config
    of_block = settings.loss == "block"
    start = Start(method=settings.start, kv_heads=settings.kv_heads, channels=settings.channels)
    # Those of a subblock come one after another, and share it: its channels are ranked once.
    read = lru_cache(maxsize=1)(partial(statistics.parent_subblock, parent, start, run.device))

    def student(layer: int, variants: Sequence[Variant], state: State, power: Tensor, trained: bool = True) -> Student:
        return Student(layer, variants, config, state, float(power), run.device, trained=trained, loss=settings.loss)

    def of_variant(layer: int, variant: Variant) -> Student:
        own = read(layer, variant.subblock)
        power = statistics.layer(layer)["block_power"] if of_block else own.statistics["output_power"]
        solved = variant.closed_form and settings.start == "closed_form" and not of_block
        return student(layer, [variant], variant.initialise(own), power, trained=not solved)

    def of_whole(layer: int, block: BlockVariant, subblocks: Library) -> Student:
        power = statistics.layer(layer)["block_power" if of_block else "block_contribution_power"]
        return student(layer, block.subblocks, subblocks.block_state(layer, block), power)

    if subblocks is None:
        return [
            StudentPlan(layer, [variant], variant.num_params(config), partial(of_variant, layer, variant), identity)
            for layer, choices in enumerate(space.layers)
            for variant in (*choices.attention[1:], *choices.ffn[1:])
        ]
    return [
        StudentPlan(layer, block.subblocks, num_params, partial(of_whole, layer, block, subblocks), made_of)
        for layer, choices in enumerate(space.layers)
        for block in choices.blocks()[1:]
        if (num_params := block.num_params(config)) and (made_of := [identity, subblocks.sources(layer, block)])
    ]


def _nested(root: Path, parent: Parent, rows: Sequence[LibraryRow]) -> list[LibraryRow]:
    """Law 4: a variant that ended worse than a narrower one takes over the narrower one's function."""
    variants = [parse_variant(cast(Subblock, row.subblock), row.variant) for row in rows]
    narrower = defaultdict[tuple[int, str], list[LibraryRow]](list)
    nested = list(rows)
    for place in sorted(range(len(rows)), key=lambda place: variants[place].num_params(parent.config)):
        row, variant = rows[place], variants[place]
        for narrow in narrower[row.layer, row.subblock]:
            if narrow.file and narrow.loss < row.loss:
                source = parse_variant(variant.subblock, narrow.widened_from or narrow.variant)
                if source.widen(read_tensors(root / narrow.file), variant, parent.config):
                    row = replace(row, file=narrow.file, widened_from=source.name, loss=narrow.loss)
        nested[place] = row
        narrower[row.layer, row.subblock].append(row)
    return nested


def promising_space(run: Run, parent: Parent, statistics: Statistics, space: Space) -> Space:
    """`space` without the variants that start with `space.prune` times the error of a smaller one.

    No forward pass is made. The expected losses are kept as `expected.json`.
    """
    ratio, library = run.recipe.space.prune, run.recipe.library
    if ratio is None:
        return space
    # By closed forms whatever the library starts with: the paper's linear maps start worse than nothing at all.
    start = Start(kv_heads=library.kv_heads, channels=library.channels)
    stage = run.open(SPACE, parent=parent, statistics=statistics, space=variant_names(space))
    file = stage.path / "expected.json"
    if not stage.done:
        read = partial(statistics.parent_subblock, parent, start, run.device)
        write_json(file, [[*key, loss] for key, loss in expected_losses(read, space).items()])
        stage.commit()
    losses = {(layer, subblock, variant): loss for layer, subblock, variant, loss in read_json(file)}
    pruned = prune_space(space, losses, parent.config, ratio)
    before, after = (sum(len(layer.attention) + len(layer.ffn) for layer in each.layers) for each in (space, pruned))
    if before != after:
        run.log(
            f"space: {before - after} of {before} variants start {ratio:g} times worse than a smaller one; left out"
        )
    return pruned


def variant_names(space: Space) -> list[list[str]]:
    """Of every layer, for addresses."""
    return [[variant.name for variant in (*layer.attention, *layer.ffn)] for layer in space.layers]


def narrow_space(space: Space, solutions: Sequence[Sequence[str]], keep: int, always: Sequence[str]) -> Space:
    """Per layer and subblock, the `keep` variants most used by the architectures, and the parent's own (paper F.1.1).

    Args:
        solutions: architectures of a frontier, each one block name a layer, such as `kv2+w512`.
        always: an architecture whose variants stay in any case, so that what it reaches can still be reached.
    """
    layers = []
    for index, layer in enumerate(space.layers):
        uses = Counter(v for solution in solutions for v in BlockVariant.parse(solution[index]).subblocks)
        subblocks = []
        for variants in (layer.attention, layer.ffn):
            ranked = sorted(variants, key=lambda variant: -uses[variant])  # where uses are equal, the first ones first
            kept = (variants[0], *ranked[:keep], *BlockVariant.parse(always[index]).subblocks)
            subblocks.append(tuple(variant for variant in variants if variant in kept))
        layers.append(LayerSpace(*subblocks))
    return Space(tuple(layers))
