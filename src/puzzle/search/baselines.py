"""What one does without the search, on the same library, costs and bounds: each baseline one small function."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from puzzle.artefacts import ScoreRow, Solution
from puzzle.errors import PuzzleError
from puzzle.search.constraints import Allowed
from puzzle.search.exact import beats, best, broken, evaluated
from puzzle.search.program import Row
from puzzle.search.tables import Choices, Tables

DROPPED = ("none+none", "none")
"""Names of an empty layer."""


def solve_baseline(tables: Tables, name: str, seed: int = 0) -> Solution:
    """The architecture that baseline `name` finds within the target's bounds, checked against the raw tables, unproven.

    Args:
        seed: of `random`; the others draw nothing.

    Raises:
        PuzzleError: there is no such baseline, or it finds nothing within the bounds; the search itself still may.
    """
    if name not in BASELINES:
        raise PuzzleError(f"baseline {name!r} is unknown; use one of {', '.join(BASELINES)}")
    if not any(demand.cost_bounds for demand in tables.demands):
        raise PuzzleError("target: no cost is bounded; a baseline needs that, for example `throughput: 2x`")
    found = random(tables, seed) if name == "random" else BASELINES[name](tables)
    if found is None:
        raise PuzzleError(f"baseline {name}: it finds nothing within the target; loosen the target or take another")
    return found


def random(tables: Tables, seed: int = 0) -> Solution | None:
    """A random architecture within the bounds, whatever the scores say (paper section F.2.4).

    The optimum over random scores: always within the bounds, however tight, where anything is. The scores are Gumbel
    noise, for which every architecture is equally likely where no bound binds.
    """
    rows = tables.scores.rows
    noise = np.random.default_rng(seed).gumbel(size=len(rows)).tolist()
    own = {row.layer: value for row, value in zip(rows, noise, strict=True) if row.block == tables.parent[row.layer]}
    return _optimum(tables, [replace(row, kl=own[row.layer] - value) for row, value in zip(rows, noise, strict=True)])


def greedy(tables: Tables) -> Solution | None:
    """A budget for each layer, spent one after another (paper section F.2.2).

    Each bound is split equally over the layers; the easiest layer, of lowest mean score, chooses first. Each takes the
    block of lowest score within its budget, and what it leaves over is the next one's. Where nothing fits, it takes
    what overdraws least, and the next ones have less.
    """

    def propose(choices: Sequence[Choices]) -> Iterator[Sequence[str]]:
        rows = _cost_rows(tables, choices)
        limits, terms = np.array([row.limit for row in rows]), np.stack([row.terms for row in rows], axis=1)
        scores = choices[0].terms["score"]
        layers = [np.flatnonzero(tables.groups == group) for group in range(len(tables.rules.blocks))]
        chosen, budget = np.zeros(len(layers), dtype=np.int64), np.zeros(len(limits))
        for group in np.argsort([scores[entries].mean() for entries in layers], kind="stable"):
            entries = layers[group]
            budget += limits * len(tables.rules.members[group]) / tables.scores.num_layers
            overdrawn = np.maximum(terms[entries] - budget, 0).max(axis=1)
            chosen[group] = entries[np.lexsort((scores[entries], overdrawn))[0]]
            budget -= terms[chosen[group]]
        yield tables.architecture(chosen)

    return _best_of(tables, propose)


def max_parameters(tables: Tables) -> Solution | None:
    """As many parameters as the bounds allow, whatever the scores say (paper section F.2.3)."""
    batch_size = tables.costs.batch_sizes[0]  # parameters are the same at all

    def params(layer: int, block: str) -> int:
        return tables.costs.block(layer, block, batch_size).params

    parents = [params(layer, block) for layer, block in enumerate(tables.parent)]
    scale = sum(parents) or 1
    return _optimum(
        tables,
        [replace(row, kl=(parents[row.layer] - params(row.layer, row.block)) / scale) for row in tables.scores.rows],
    )


def depth(tables: Tables) -> Solution | None:
    """Whole layers dropped by block influence, as few as it takes, and nothing else changed (arXiv 2403.03853)."""
    dropped = _empty_layers(tables)
    architectures = [
        [dict(dropped[:count]).get(layer, block) for layer, block in enumerate(tables.parent)]
        for count in range(len(dropped) + 1)
    ]
    return _best_of(tables, lambda choices: architectures)


def uniform(tables: Tables) -> Solution | None:
    """The same block in every layer (Minitron, arXiv 2407.14679); if that is not enough, layers go as in `depth`."""
    every = [[row.block for row in tables.known_scores.layer(layer)] for layer in range(tables.scores.num_layers)]
    dropped = _empty_layers(tables)
    for count in range(min(len(dropped), len(every) - 1) + 1):
        some = dict(dropped[:count])
        kept = [layer for layer in range(len(every)) if layer not in some]
        common = [block for block in every[kept[0]] if all(block in every[layer] for layer in kept)]
        common = [block for block in common if block not in DROPPED]  # layers go one after another, not all at once
        groups = tuple(0 if layer in kept else 1 + [*some].index(layer) for layer in range(len(every)))
        rules = Allowed(groups, (tuple(common), *((block,) for block in some.values())))
        found = best(replace(tables, allowed=rules)) if common else None
        if found is not None:
            return _checked(tables, found.blocks, [serving.batch_size for serving in found.servings])
    return None


BASELINES: dict[str, Callable[[Tables], Solution | None]] = {
    "random": random,
    "greedy": greedy,
    "max-parameters": max_parameters,
    "uniform": uniform,
    "depth": depth,
}
"""Each gives None where it finds nothing within the bounds."""


def _empty_layers(tables: Tables) -> list[tuple[int, str]]:
    """Layers that can be dropped, with the block that does it, those of lowest influence first; without influences by
    the score of the empty layer.
    """
    empty = {row.layer: row.block for row in tables.known_scores.rows if row.block in DROPPED}
    score = tables.settings.score
    values = {layer: tables.scores.value(layer, block, score) for layer, block in empty.items()}
    if tables.influence:
        values = dict(enumerate(tables.influence()))
    return sorted(empty.items(), key=lambda item: values[item[0]])


def _cost_rows(tables: Tables, choices: Sequence[Choices]) -> list[Row]:
    """Every bound on a cost, in all scenarios."""
    return [row for each, demand in zip(choices, tables.demands, strict=True) for row in each.rows(demand.cost_bounds)]


def _best_of(tables: Tables, propose: Callable[[Sequence[Choices]], Iterable[Sequence[str]]]) -> Solution | None:
    """The best of what is proposed at each combination of batch sizes."""
    found: Solution | None = None
    for choices in itertools.product(*tables.choices):
        for blocks in propose(choices):
            solution = _checked(tables, blocks, [each.batch_size for each in choices])
            if solution and beats(solution, found):
                found = solution
    return found


def _optimum(tables: Tables, rows: Iterable[ScoreRow]) -> Solution | None:
    """The optimum over other KL scores, within the same bounds on costs and the same rules."""
    parents_first = sorted(rows, key=lambda row: row.block != tables.parent[row.layer])
    settings = tables.settings.model_copy(update={"score": "kl"})
    scores = replace(tables.scores, rows=tuple(parents_first))
    other = replace(tables, scores=scores, settings=settings, allowed=tables.rules)
    found = best(other, [demand.cost_bounds for demand in tables.demands])
    return found and _checked(tables, found.blocks, [serving.batch_size for serving in found.servings])


def _checked(tables: Tables, blocks: Sequence[str], batch_sizes: Sequence[int]) -> Solution | None:
    """The solution, if all bounds are met, and `search.fix`, `forbid` and `equal` are kept to."""
    solution, first = evaluated(tables, blocks, batch_sizes), dict[int, str]()
    kept = all(
        block in tables.rules.blocks[group] and first.setdefault(group, block) == block
        for group, block in zip(tables.rules.groups, blocks, strict=True)
    )
    return solution if kept and not broken(solution) else None
