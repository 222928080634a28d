"""What is trained for a space: every student with how it starts and where its result is kept.

    variants/DIGEST.json           what came of one student; shared by every library of the run folder
    variants/DIGEST.safetensors    its weights; none for a variant without weights

The digest is that of everything that the result follows from, so that nothing is trained twice.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import LibraryRow
from puzzle.library.statistics import Statistics
from puzzle.library.students import Student
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import digest, read_json, write_json, write_tensors
from puzzle.variants import (
    SUBBLOCKS,
    BlockVariant,
    ParentSubblock,
    Space,
    Start,
    State,
    Subblock,
    Variant,
    split_state,
)


@dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """A student before it is built."""

    layer: int
    subblock: str
    """`attention`, `ffn` or `block`."""
    variant: str
    num_params: int
    identity: dict[str, Any]
    """What its weights follow from, beside layer, subblock and variant."""
    build: Callable[[], Student]

    def file(self, root: Path) -> Path:
        identity = self.identity | {"layer": self.layer, "subblock": self.subblock, "variant": self.variant}
        return root / "variants" / f"{digest(identity)[:24]}.json"

    def row(self, root: Path) -> LibraryRow | None:
        """What came of it; None if it is not trained yet."""
        file = self.file(root)
        return LibraryRow(**read_json(file)) if file.exists() else None

    def write(self, root: Path, state: State, initial_loss: float, loss: float, tokens: int) -> None:
        """Keep what came of it."""
        file = self.file(root)
        file.parent.mkdir(exist_ok=True)
        weights = file.with_suffix(".safetensors")
        if state:
            write_tensors(weights, state)
        row = LibraryRow(
            layer=self.layer,
            subblock=self.subblock,
            variant=self.variant,
            file=str(weights.relative_to(root)) if state else "",
            widened_from="",
            initial_loss=initial_loss,
            loss=loss,
            trained_tokens=tokens,
        )
        write_json(file, asdict(row))


def parent_subblock(
    parent: Parent, statistics: Statistics, start: Start, device: torch.device, layer: int, subblock: Subblock
) -> ParentSubblock:
    """What the variants of a subblock start from, on the device where closed forms are solved."""
    state, moments = split_state(parent.layer_state(layer), subblock), statistics.subblock(layer, subblock)
    return ParentSubblock(
        config=parent.config,
        variant=parent.architecture.blocks[layer].subblock(subblock),
        state={name: value.to(device) for name, value in state.items()},
        statistics={name: value.to(device) for name, value in moments.items()},
        start=start,
    )


def subblock_plans(
    settings: LibrarySettings,
    device: torch.device,
    parent: Parent,
    statistics: Statistics,
    space: Space,
    identity: dict[str, Any],
) -> list[StudentPlan]:
    """A student for every variant but the parent's own."""
    start = Start(method=settings.start, kv_heads=settings.kv_heads, channels=settings.channels)

    @lru_cache(maxsize=1)
    def own(layer: int, subblock: Subblock) -> ParentSubblock:
        """Shared by the variants of a subblock, which come one after another: its channels are ranked once."""
        return parent_subblock(parent, statistics, start, device, layer, subblock)

    def build(layer: int, variant: Variant) -> Student:
        subblock = own(layer, variant.subblock)
        of_block = settings.loss == "block"
        power = float(statistics.layer(layer)["block_power"] if of_block else subblock.statistics["output_power"])
        solved = variant.closed_form and settings.start == "closed_form" and not of_block
        state = variant.initialise(subblock)
        return Student(layer, [variant], parent.config, state, power, device, trained=not solved, loss=settings.loss)

    return [
        StudentPlan(
            layer=layer,
            subblock=variant.subblock,
            variant=variant.name,
            num_params=variant.num_params(parent.config),
            identity=identity,
            build=partial(build, layer, variant),
        )
        for layer, layer_space in enumerate(space.layers)
        for subblock in SUBBLOCKS
        for variant in layer_space.subblock(subblock)[1:]
    ]


def block_plans(
    settings: LibrarySettings,
    device: torch.device,
    parent: Parent,
    statistics: Statistics,
    space: Space,
    identity: dict[str, Any],
    state: Callable[[int, BlockVariant], State],
    sources: Callable[[int, BlockVariant], Any],
) -> list[StudentPlan]:
    """A student for every composed block but the parent's own and those without weights (paper section 2.2).

    Args:
        state: the weights that a block of a layer starts with. sources: what stands for these in its identity.
    """

    def build(layer: int, block: BlockVariant) -> Student:
        moments = statistics.layer(layer)
        power = float(moments["block_power" if settings.loss == "block" else "block_contribution_power"])
        variants = [block.attention, block.ffn]
        return Student(layer, variants, parent.config, state(layer, block), power, device, loss=settings.loss)

    plans = []
    for layer, layer_space in enumerate(space.layers):
        for block in layer_space.blocks()[1:]:
            if count := block.num_params(parent.config):
                plan = StudentPlan(
                    layer=layer,
                    subblock="block",
                    variant=block.name,
                    num_params=count,
                    identity=identity | {"start": sources(layer, block)},
                    build=partial(build, layer, block),
                )
                plans.append(plan)
    return plans
