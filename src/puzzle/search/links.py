"""What no row over the choices alone can say: pairs of blocks, and the number of kinds, by auxiliary columns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from puzzle.artefacts import PairTerm
from puzzle.errors import PuzzleError
from puzzle.search.constraints import Allowed
from puzzle.search.problem import Choices, Floats, Ints, Link, Program

PairScores = Mapping[tuple[int, int], Mapping[tuple[str, str], float]]
"""By two layers, the first the lower, and their two blocks."""


def pair_scores(pairs: Sequence[PairTerm], allowed: Allowed) -> PairScores:
    """The scores of the pairs that can be chosen, those of one pair added up, layers that are to be equal as one.

    Two blocks of such layers are one choice: the pair stands at (layer, layer), with one block twice.
    """
    found: dict[tuple[int, int], dict[tuple[str, str], float]] = {}
    for pair in pairs:
        _check(pair, len(allowed.groups))
        (first, one), (second, other) = sorted(
            (allowed.groups[layer], block) for layer, block in zip(pair.layers, pair.blocks, strict=True)
        )
        possible = one in allowed.blocks[first] and other in allowed.blocks[second]
        if possible and (first != second or one == other):
            scores = found.setdefault((first, second), {})
            scores[one, other] = scores.get((one, other), 0.0) + pair.score
    return found


def _check(pair: PairTerm, num_layers: int) -> None:
    first, second = pair.layers
    if first == second or not (0 <= first < num_layers and 0 <= second < num_layers) or not np.isfinite(pair.score):
        raise PuzzleError(
            f"pairs: found layers {first} and {second} with a score of {pair.score:g}; a pair term needs two different "
            f"layers of 0 to {num_layers - 1} and a finite score"
        )


def paired(choices: Choices, pairs: PairScores) -> Ints:
    """[n]: a number of its own for each entry that a pair speaks of, 0 for all others, as `build_program` wants it."""
    named = {
        (layer, block)
        for layers, scores in pairs.items()
        for key in scores
        for layer, block in zip(layers, key, strict=True)
    }
    keys = zip(choices.layers.tolist(), choices.blocks, strict=True)
    return np.array([place if key in named else 0 for place, key in enumerate(keys, 1)], dtype=np.int64)


def with_pairs(program: Program, choices: Choices, pairs: PairScores, *, in_objective: bool) -> Program:
    """With a column for each two blocks of two layers, one of which every solution takes: exact for any signs.

    For two layers, the blocks that no pair speaks of count as one. The columns of each block add up to its own (the
    node-edge form), whose linear relaxation is the tightest for two layers alone.
    """
    for (first, second), scores in pairs.items():
        if first == second:
            program = _with_own(
                program, choices, first, {one: score for (one, _), score in scores.items()}, in_objective
            )
            continue
        ones, others = (
            _classes(program, choices, layer, sorted({key[side] for key in scores}))
            for side, layer in enumerate((first, second))
        )
        table = np.array([[scores.get((one, other), 0.0) for other in others] for one in ones])
        new = len(program.objective) + np.arange(table.size).reshape(table.shape)
        sums = [*zip(ones.values(), new, strict=True), *zip(others.values(), new.T, strict=True)]
        program = _extended(program, table.ravel(), in_objective, [_equal(*each) for each in sums])
    return program


def _with_own(
    program: Program, choices: Choices, layer: int, scores: Mapping[str, float], in_objective: bool
) -> Program:
    """With scores added to those of single blocks of one layer."""
    added = np.zeros(len(program.objective))
    for position in np.flatnonzero(program.layers == layer):
        added[position] = scores.get(choices.blocks[program.entries[position]], 0.0)
    return replace(
        program,
        objective=program.objective + added * in_objective,
        rows=tuple(replace(row, terms=row.terms + row.pairs * added) for row in program.rows),
    )


def _classes(program: Program, choices: Choices, layer: int, named: Sequence[str]) -> dict[str, Ints]:
    """The layer's positions by block for those in `named`, and of all others together, by no name."""
    classes: dict[str, list[int]] = {block: [] for block in [*named, ""]}
    for position in np.flatnonzero(program.layers == layer).tolist():
        block = choices.blocks[program.entries[position]]
        classes[block if block in named else ""].append(position)
    return {block: np.array(positions, dtype=np.int64) for block, positions in classes.items()}


def _equal(positions: Ints, columns: Ints) -> Link:
    """One sum is the other."""
    values = np.concatenate([np.ones(len(positions)), -np.ones(len(columns))])
    return Link(columns=np.concatenate([positions, columns]), values=values, lower=0.0, upper=0.0)


def _extended(program: Program, scores: Floats, in_objective: bool, links: Sequence[Link]) -> Program:
    """With a column more for each of `scores`."""
    return replace(
        program,
        objective=np.concatenate([program.objective, scores * in_objective]),
        rows=tuple(replace(row, terms=np.concatenate([row.terms, row.pairs * scores])) for row in program.rows),
        links=(*program.links, *links),
    )


def with_kinds(program: Program, choices: Choices, kinds: int) -> Program:
    """With at most `kinds` distinct blocks: a column for each block, which is 1 where any layer takes it."""
    names = [choices.blocks[entry] for entry in program.entries]
    size, distinct = len(program.objective), sorted(set(names))
    columns = {name: size + place for place, name in enumerate(distinct)}
    taken = [
        Link(columns=np.array([position, columns[name]]), values=np.array([1.0, -1.0]), lower=-np.inf, upper=0.0)
        for position, name in enumerate(names)
    ]
    total = Link(
        columns=np.array([*columns.values()]), values=np.ones(len(distinct)), lower=-np.inf, upper=float(kinds)
    )
    return _extended(program, np.zeros(len(distinct)), False, [*taken, total])
