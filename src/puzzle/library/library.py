"""The block library: an index over the trained variants of a space, and their weights on disk.

Law 4, wider is not worse, is a property of the index: where a narrower variant ended better, the wider one takes over
its function.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library.bld import train_students
from puzzle.library.space import variant_names
from puzzle.library.starts import StudentPlan, block_plans, subblock_plans
from puzzle.library.statistics import Statistics
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, read_parsed, read_tensors, write_text
from puzzle.stages import LIBRARY
from puzzle.variants import (
    SUBBLOCKS,
    BlockVariant,
    Space,
    State,
    Subblock,
    Variant,
    parse_variant,
    split_state,
)


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
    subblocks = build_library(run, parent, data, statistics, space) if coupled else None
    made = {"parent": parent, "data": data, "statistics": statistics, "space": variant_names(space), "coupled": coupled}
    stage = run.open(LIBRARY, **made)
    index_file = stage.path / "index.json"
    if not stage.done:
        identity = read_json(stage.path / "stage.json")  # of each student: the stage's, whatever else there is to train
        for name in ("space", "coupled"):
            del identity["inputs"][name]
        training = _Training(run, parent, data, statistics, space, subblocks, identity)
        plans, params = training.plans(), Counter[int]()
        for plan in plans:
            params[plan.layer] += plan.num_params
        for_layers(run, stage, training, [1.0 + params[layer] for layer in range(len(space.layers))])
        rows = [row for plan in plans if (row := plan.row(run.path)) is not None]
        assert len(rows) == len(plans), "every student is trained"
        rows = _nested(run.path, parent, rows) if subblocks is None else [*subblocks.index.rows, *rows]
        write_text(index_file, LibraryIndex(rows=tuple(rows)).to_json())
        stage.commit(variants=len(rows))
    return Library(run.path, stage.address, parent, read_parsed(index_file, LibraryIndex.from_json))


@dataclass(frozen=True)
class _Training:
    """A task for any range of layers, also in another process, which makes its plans anew."""

    run: Run
    parent: Parent
    data: TokenData
    statistics: Statistics
    space: Space
    subblocks: Library | None
    """What whole blocks start from; None: subblocks are trained."""
    identity: dict[str, Any]

    def __call__(self, layers: range, folder: Path) -> None:
        plans = [plan for plan in self.plans() if plan.layer in layers]
        train_students(self.run, self.parent, self.data, plans, folder)

    def plans(self) -> list[StudentPlan]:
        settings, device = self.run.recipe.library, self.run.device
        made = settings, device, self.parent, self.statistics, self.space, self.identity
        if self.subblocks is None:
            return subblock_plans(*made)
        return block_plans(*made, self.subblocks.block_state, self.subblocks.sources)


def _nested(root: Path, parent: Parent, rows: Sequence[LibraryRow]) -> list[LibraryRow]:
    """Law 4: a variant that ended worse than a narrower one takes over the narrower one's function."""
    narrower: dict[tuple[int, str], list[LibraryRow]] = {}
    nested = {}
    for row in sorted(rows, key=lambda row: _variant(row).num_params(parent.config)):
        before = narrower.setdefault((row.layer, row.subblock), [])
        nested[row.layer, row.subblock, row.variant] = found = _best_form(root, parent, row, before)
        before.append(found)
    return [nested[row.layer, row.subblock, row.variant] for row in rows]


def _best_form(root: Path, parent: Parent, row: LibraryRow, narrower: Sequence[LibraryRow]) -> LibraryRow:
    variant = _variant(row)
    for narrow in narrower:
        if not narrow.file or narrow.loss >= row.loss:
            continue
        source = parse_variant(variant.subblock, narrow.widened_from or narrow.variant)
        if source.widen(read_tensors(root / narrow.file), variant, parent.config):
            row = replace(row, file=narrow.file, widened_from=source.name, loss=narrow.loss)
    return row


def _variant(row: LibraryRow) -> Variant:
    subblock: Subblock = "attention" if row.subblock == "attention" else "ffn"
    return parse_variant(subblock, row.variant)
