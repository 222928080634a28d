"""The block library: which variants there are, and their weights.

Variants are trained by `bld` and kept by `store`; a library is an index over them for one space. Law 4, wider is not
worse, is a property of the index: where a narrower variant ended better, the wider one takes over its function.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library.bld import Group, train_groups
from puzzle.library.groups import block_groups, subblock_groups
from puzzle.library.statistics import Statistics
from puzzle.library.store import Trained, VariantStore
from puzzle.parents import Parent
from puzzle.runs import Run, read_parsed, read_tensors, write_text
from puzzle.variants import (
    SUBBLOCKS,
    BlockVariant,
    Space,
    State,
    Subblock,
    Variant,
    num_params,
    parse_variant,
    split_state,
)


@dataclass(frozen=True)
class Library:
    """The finished library: an index, and the weights on disk."""

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
        row = self.index.row(layer, subblock, variant.name)
        state = read_tensors(self.root / row.file) if row.file else {}
        if not row.widened_from:
            return state
        widened = parse_variant(subblock, row.widened_from).widen(state, variant, self.parent.config)
        assert widened is not None, f"{row.widened_from} has no form as {variant}"
        return widened

    def block_state(self, layer: int, block: BlockVariant) -> State:
        """The weights of a block: those it was trained with as a whole, else its subblocks'."""
        row = self.index.find(layer, "block", block.name)
        if row is not None:
            return read_tensors(self.root / row.file)
        return self.state(layer, block.attention) | self.state(layer, block.ffn)

    def sources(self, layer: int, block: BlockVariant) -> list[list[str]]:
        """What the subblocks of a block are made of: their files, and the variants that are widened."""
        rows = [self.index.find(layer, subblock, block.subblock(subblock).name) for subblock in SUBBLOCKS]
        return [[row.file, row.widened_from] for row in rows if row is not None]


def build_library(
    run: Run, parent: Parent, data: TokenData, statistics: Statistics, space: Space, *, coupled: bool = False
) -> Library:
    """Initialise and train all variants that `space` names beside the parent's own.

    Args:
        coupled: also train every block composed of them as a whole (paper section 2.2).
    """
    settings = run.recipe.library.model_dump(mode="json", exclude={"coupled"})
    settings |= {"precision": run.recipe.precision, "seed": run.recipe.seed, "code": 4}
    inputs = [parent.address, data.address, statistics.address]
    names = [[variant.name for subblock in SUBBLOCKS for variant in layer.subblock(subblock)] for layer in space.layers]
    subblocks = build_library(run, parent, data, statistics, space) if coupled else None
    stage = run.stage("library", version=2, settings=settings | {"space": names, "coupled": coupled}, inputs=inputs)
    index_file = stage.path / "index.json"
    if not stage.done:
        work = _Training(run, parent, data, statistics, space, subblocks, {"settings": settings, "inputs": inputs})
        groups, store = work.groups(), work.store()
        params = Counter[int]()
        for group in groups:
            params[group.layer] += group.params
        for_layers(run, stage, work, [1.0 + params[layer] for layer in range(len(space.layers))])
        rows = [row for group in groups for row in _rows(group, store)]
        rows = rows if subblocks is not None else _nested(run.path, parent, rows)
        index = LibraryIndex(rows=(*(() if subblocks is None else subblocks.index.rows), *rows))
        write_text(index_file, index.to_json())
        stage.commit(variants=len(index.rows))
    return Library(run.path, stage.address, parent, read_parsed(index_file, LibraryIndex.from_json))


@dataclass(frozen=True)
class _Training:
    """A task for any range of layers: train what the space has there. Other processes make its groups anew."""

    run: Run
    parent: Parent
    data: TokenData
    statistics: Statistics
    space: Space
    subblocks: Library | None
    """What whole blocks start from; None: subblocks are trained."""
    identity: dict[str, Any]
    """Of the store."""

    def __call__(self, layers: range, folder: Path) -> None:
        groups = [group for group in self.groups() if group.layer in layers]
        train_groups(self.run, self.parent, self.data, self.store(), groups, folder)

    def groups(self) -> list[Group]:
        if self.subblocks is None:
            return subblock_groups(self.run, self.parent, self.statistics, self.space)
        return block_groups(self.run, self.parent, self.statistics, self.space, self.subblocks.block_state)

    def store(self) -> VariantStore:
        if self.subblocks is None:
            return VariantStore(self.run, self.identity)
        blocks = [(group.layer, group.variants) for group in self.groups()]
        starts = {
            (layer, names): self.subblocks.sources(layer, BlockVariant.parse(names[0])) for layer, names in blocks
        }
        return VariantStore(self.run, self.identity, starts)


def _rows(group: Group, store: VariantStore) -> list[LibraryRow]:
    finished = store.finished(group.layer, group.subblock, group.variants)
    assert finished is not None, "trained before"
    return [_row(group, trained) for trained in finished]


def _row(group: Group, trained: Trained) -> LibraryRow:
    return LibraryRow(
        layer=group.layer,
        subblock=group.subblock,
        variant=trained.variant,
        file=trained.file,
        widened_from="",
        initial_loss=trained.initial_loss,
        loss=trained.loss,
        trained_tokens=trained.tokens,
    )


def _nested(root: Path, parent: Parent, rows: Sequence[LibraryRow]) -> list[LibraryRow]:
    """Law 4: a variant that ended worse than a narrower one takes over the narrower one's function."""
    best: dict[tuple[int, str], list[LibraryRow]] = {}
    nested = []
    for row in sorted(rows, key=lambda row: num_params(_variant(row), parent.config)):
        variant = _variant(row)
        for narrow in best.setdefault((row.layer, row.subblock), []):
            source = parse_variant(variant.subblock, narrow.widened_from or narrow.variant)
            if (
                narrow.file
                and narrow.loss < row.loss
                and source.widen(read_tensors(root / narrow.file), variant, parent.config)
            ):
                row = replace(row, file=narrow.file, widened_from=source.name, loss=narrow.loss)
        best[row.layer, row.subblock].append(row)
        nested.append(row)
    order = {(row.layer, row.subblock, row.variant): position for position, row in enumerate(rows)}
    return sorted(nested, key=lambda row: order[row.layer, row.subblock, row.variant])


def _variant(row: LibraryRow) -> Variant:
    subblock: Subblock = "attention" if row.subblock == "attention" else "ffn"
    return parse_variant(subblock, row.variant)
