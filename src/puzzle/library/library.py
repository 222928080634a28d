"""The block library: an index over the trained variants of a space, and their weights on disk.

Law 4, wider is not worse, is a property of the index: where a narrower variant ended better, the wider one takes over
its function.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.distributed.tasks import for_layers
from puzzle.library.bld import StudentPlan, train_students
from puzzle.library.space import variant_names
from puzzle.library.statistics import Statistics
from puzzle.library.students import Student
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run, read_json, read_parsed, read_tensors, write_text
from puzzle.stages import LIBRARY
from puzzle.variants import (
    SUBBLOCKS,
    BlockVariant,
    LayerSpace,
    ParentSubblock,
    Space,
    Start,
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
            params[plan.row.layer] += plan.num_params
        for_layers(run, stage, training, [1.0 + params[layer] for layer in range(len(space.layers))])
        rows = [row for plan in plans if (row := plan.result(run.path)) is not None]
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
    """What all students follow from."""

    def __call__(self, layers: range, folder: Path) -> None:
        plans = [plan for plan in self.plans() if plan.row.layer in layers]
        train_students(self.run, self.parent, self.data, plans, folder)

    def plans(self) -> list[StudentPlan]:
        layers = enumerate(self.space.layers)
        if self.subblocks is not None:
            return [plan for layer, space in layers for plan in self._block_plans(self.subblocks, layer, space)]
        # Those of a subblock come one after another, and share it: its channels are ranked once.
        settings = self._settings
        start = Start(method=settings.start, kv_heads=settings.kv_heads, channels=settings.channels)
        read = lru_cache(maxsize=1)(partial(self.statistics.parent_subblock, self.parent, start, self.run.device))
        return [
            self._subblock_plan(read, layer, v)
            for layer, space in layers
            for which in SUBBLOCKS
            for v in space.subblock(which)[1:]
        ]

    @property
    def _settings(self) -> LibrarySettings:
        return self.run.recipe.library

    def _subblock_plan(
        self, read: Callable[[int, Subblock], ParentSubblock], layer: int, variant: Variant
    ) -> StudentPlan:
        """Of a variant beside the parent's own."""
        of_block = self._settings.loss == "block"

        def build() -> Student:
            own = read(layer, variant.subblock)
            power = self.statistics.layer(layer)["block_power"] if of_block else own.statistics["output_power"]
            solved = variant.closed_form and self._settings.start == "closed_form" and not of_block
            return self._student(layer, [variant], variant.initialise(own), float(power), trained=not solved)

        size = variant.num_params(self.parent.config)
        return StudentPlan.of(layer, variant.subblock, variant.name, size, self.identity, build)

    def _block_plans(self, library: Library, layer: int, space: LayerSpace) -> Iterator[StudentPlan]:
        """Of every composed block but the parent's own and those without weights (paper section 2.2)."""
        moment = "block_power" if self._settings.loss == "block" else "block_contribution_power"

        def build(block: BlockVariant) -> Student:
            power = float(self.statistics.layer(layer)[moment])
            return self._student(layer, block.subblocks, library.block_state(layer, block), power)

        for block in space.blocks()[1:]:
            if size := block.num_params(self.parent.config):
                identity = [self.identity, library.sources(layer, block)]
                yield StudentPlan.of(layer, "block", block.name, size, identity, partial(build, block))

    def _student(
        self, layer: int, variants: Sequence[Variant], state: State, power: float, trained: bool = True
    ) -> Student:
        device, loss = self.run.device, self._settings.loss
        return Student(layer, variants, self.parent.config, state, power, device, trained=trained, loss=loss)


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
