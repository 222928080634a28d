"""Which blocks each layer may take by `search.fix`, `search.forbid` and `search.equal`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from puzzle.artefacts import ScoreTable
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings


@dataclass(frozen=True)
class Allowed:
    """Groups of layers that take one block together, and the blocks that each group may take."""

    groups: tuple[int, ...]
    """For each layer its group, counted from 0 in the order of their first layers."""
    blocks: tuple[tuple[str, ...], ...]
    """For each group."""

    @cached_property
    def members(self) -> list[list[int]]:
        """For each group its layers."""
        return [[layer for layer, group in enumerate(self.groups) if group == each] for each in range(len(self.blocks))]


def allowed_blocks(scores: ScoreTable, settings: SearchSettings) -> Allowed:
    """What the settings allow of the blocks that have scores.

    Raises:
        PuzzleError: a setting names a layer or a block that is not there, or nothing is left to choose.
    """
    every = [[row.block for row in scores.layer(layer)] for layer in range(scores.num_layers)]
    blocks = [list(names) for names in every]
    for setting, keep in (("fix", True), ("forbid", False)):
        for span, patterns in getattr(settings, setting).items():
            layers = _layers(span, scores.num_layers, f"search.{setting}")
            matching = _matching(every, scores, layers, patterns, f"search.{setting}", everywhere=keep)
            for layer in layers:
                blocks[layer] = [name for name in blocks[layer] if (name in matching[layer]) == keep]
    for layer, names in enumerate(blocks):
        if not names:
            raise PuzzleError(f"search.fix, search.forbid: they leave layer {layer} no block; loosen one of them")
    groups = _groups(settings.equal, scores.num_layers)
    common: list[tuple[str, ...]] = []
    for group in range(max(groups) + 1):
        members = [layer for layer, own in enumerate(groups) if own == group]
        common.append(tuple(name for name in blocks[members[0]] if all(name in blocks[layer] for layer in members)))
        if not common[-1]:
            raise PuzzleError(
                f"search.equal: layers {', '.join(map(str, members))} have no block in common that is allowed; "
                "take them apart, or loosen search.fix and search.forbid"
            )
    return Allowed(groups, tuple(common))


def check_spans(settings: SearchSettings, num_layers: int) -> None:
    """Refuse `fix`, `forbid` and `equal` that name layers the model has not."""
    for setting in ("fix", "forbid"):
        for span in getattr(settings, setting):
            _layers(span, num_layers, f"search.{setting}")
    _groups(settings.equal, num_layers)


def _matching(
    blocks: Sequence[Sequence[str]],
    scores: ScoreTable,
    layers: Sequence[int],
    patterns: str | list[str],
    setting: str,
    *,
    everywhere: bool,
) -> dict[int, set[str]]:
    """By layer the blocks that one of `patterns` names; each must name one in some layer, or in each."""
    found: dict[int, set[str]] = {layer: set() for layer in layers}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        missing = []
        for layer in layers:
            names = {name for name in blocks[layer] if _means(pattern, name, scores.parent_blocks[layer])}
            sides = {name.split("+").index(pattern) for name in names if pattern in name.split("+") and pattern != name}
            if everywhere and len(sides) > 1:
                raise PuzzleError(
                    f"{setting}: {pattern} is both an attention and an FFN; write {pattern}+* or *+{pattern}"
                )
            found[layer] |= names
            missing += [] if names else [layer]
        if missing and (everywhere or len(missing) == len(layers)):
            raise PuzzleError(
                f"{setting}: {pattern} is no block or subblock of layer {missing[0]}; it has "
                f"{', '.join(blocks[missing[0]])}"
            )
    return found


def _means(pattern: str, block: str, parent: str) -> bool:
    """Whether a block is meant: by its name or one subblock's, or by both, `*` for any and `parent` for its own."""
    if "+" not in pattern:
        return block == parent if pattern == "parent" else pattern in (block, *block.split("+"))
    wanted, found, own = pattern.split("+"), block.split("+"), parent.split("+")
    wanted = [own[side] if name == "parent" and len(own) == 2 else name for side, name in enumerate(wanted[:2])]
    return len(found) == len(wanted) and all(name in ("*", its) for name, its in zip(wanted, found, strict=True))


def _groups(equal: int | str | list[str] | None, num_layers: int) -> tuple[int, ...]:
    """For each layer the group it is in."""
    first = list(range(num_layers))
    if isinstance(equal, int):
        first = [layer - layer % equal for layer in first]
    elif equal is not None:
        taken: set[int] = set()
        for span in [equal] if isinstance(equal, str) else equal:
            layers = _layers(span, num_layers, "search.equal")
            if twice := taken.intersection(layers):
                raise PuzzleError(f"search.equal: layer {min(twice)} is in two groups; join them into one")
            taken.update(layers)
            for layer in layers:
                first[layer] = layers[0]
    order = sorted(set(first))
    return tuple(order.index(layer) for layer in first)


def _layers(span: str, num_layers: int, setting: str) -> list[int]:
    """The layers of `all`, `7`, `0-3`, `first:4`, `last:4`, ascending."""
    side, _, count = span.partition(":")
    start, _, end = span.partition("-")
    if span == "all":
        layers = range(num_layers)
    elif side == "first":
        layers = range(int(count))
    elif side == "last":
        layers = range(num_layers - int(count), num_layers)
    else:
        layers = range(int(start), int(end or start) + 1)
    if not layers or layers[0] < 0 or layers[-1] >= num_layers:
        raise PuzzleError(f"{setting}: {span} are no layers of this model, which has layers 0 to {num_layers - 1}")
    return list(layers)
