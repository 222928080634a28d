"""What a target and the search's settings must hold, and which blocks `fix`, `forbid` and `equal` leave each layer."""

from collections.abc import Sequence
from typing import NamedTuple

from puzzle.artefacts import ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import SETTINGS
from puzzle.recipe import SearchSettings, TargetSettings


class Group(NamedTuple):
    """Layers that take one block together, and the blocks that they may take."""

    layers: list[int]
    blocks: list[str]


def check_asked(targets: Sequence[TargetSettings], settings: SearchSettings) -> None:
    """Refuse targets that bound nothing, or whose best architecture is trivial.

    Args:
        targets: of the main scenario, then of the further ones.
    """
    given = [{setting for setting, amount in target if amount is not None} for target in targets]
    if not any(given):
        raise PuzzleError(
            f"target: nothing is set; set at least one of {', '.join(SETTINGS)}, for example `throughput: 2x`"
        )
    if settings.objective == "score" and not set().union(*given) - {"score"}:
        raise PuzzleError(
            "target.score: alone it is met best by the parent itself; bound a cost too, or set search.objective"
        )
    if settings.objective != "score" and "score" not in given[0]:
        raise PuzzleError(
            f"search.objective: {settings.objective} alone would give up all quality; set target.score, the highest "
            "sum of scores that you accept"
        )


def check_spans(settings: SearchSettings, num_layers: int) -> None:
    """Refuse `fix`, `forbid` and `equal` that name layers the model has not."""
    for setting in ("fix", "forbid"):
        for span in getattr(settings, setting):
            _layers(span, num_layers, setting)
    _groups(settings.equal, num_layers)


def allowed_blocks(scores: ScoreTable, settings: SearchSettings) -> list[Group]:
    """What the settings allow of the blocks that have scores, group by group, in the order of their first layers.

    Raises:
        PuzzleError: a setting names a layer or a block that is not there, or nothing is left to choose.
    """
    every = [[row.block for row in scores.layer(layer)] for layer in range(scores.num_layers)]
    blocks = list(every)
    for setting, keep in (("fix", True), ("forbid", False)):
        for span, patterns in getattr(settings, setting).items():
            matching: dict[int, set[str]] = {layer: set() for layer in _layers(span, scores.num_layers, setting)}
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                found = {
                    layer: {name for name in every[layer] if _means(pattern, name, scores.parent_blocks[layer])}
                    for layer in matching
                }
                for layer, names in found.items():
                    halves = [name.split("+") for name in names - {pattern}]
                    if keep and len({each.index(pattern) for each in halves if pattern in each}) > 1:
                        raise PuzzleError(
                            f"search.fix: {pattern} is both an attention and an FFN; write {pattern}+* or *+{pattern}"
                        )
                    matching[layer] |= names
                missing = [layer for layer, names in found.items() if not names]
                if missing and (keep or len(missing) == len(found)):
                    raise PuzzleError(
                        f"search.{setting}: {pattern} is no block or subblock of layer {missing[0]}; it has "
                        f"{', '.join(every[missing[0]])}"
                    )
            for layer, names in matching.items():
                blocks[layer] = [name for name in blocks[layer] if (name in names) == keep]
                if not blocks[layer]:
                    raise PuzzleError(f"search.fix, search.forbid: layer {layer} has no block left; loosen one of them")
    groups = []
    for layers in _groups(settings.equal, scores.num_layers):
        common = [name for name in blocks[layers[0]] if all(name in blocks[layer] for layer in layers)]
        if not common:
            raise PuzzleError(
                f"search.equal: layers {', '.join(map(str, layers))} have no block in common that is allowed; "
                "take them apart, or loosen search.fix and search.forbid"
            )
        groups.append(Group(layers, common))
    return groups


def _means(pattern: str, block: str, parent: str) -> bool:
    """Whether a block is meant: by its name or one subblock's, or by both, `*` for any and `parent` for its own."""
    if "+" not in pattern:
        return block == parent if pattern == "parent" else pattern in (block, *block.split("+"))
    wanted, found, own = pattern.split("+"), block.split("+"), parent.split("+")
    wanted = [own[side] if name == "parent" and len(own) == 2 else name for side, name in enumerate(wanted[:2])]
    return len(found) == len(wanted) and all(name in ("*", its) for name, its in zip(wanted, found, strict=True))


def _groups(equal: int | str | list[str] | None, num_layers: int) -> list[list[int]]:
    """The layers of each group, in the order of their first ones."""
    if isinstance(equal, int):
        return [list(range(num_layers)[first : first + equal]) for first in range(0, num_layers, equal)]
    groups: list[list[int]] = []
    taken: set[int] = set()
    for span in [equal] if isinstance(equal, str) else equal or []:
        groups.append(_layers(span, num_layers, "equal"))
        if twice := taken.intersection(groups[-1]):
            raise PuzzleError(f"search.equal: layer {min(twice)} is in two groups; join them into one")
        taken.update(groups[-1])
    return sorted([*groups, *([layer] for layer in range(num_layers) if layer not in taken)])


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
        raise PuzzleError(
            f"search.{setting}: {span} are no layers of this model, which has layers 0 to {num_layers - 1}"
        )
    return list(layers)
