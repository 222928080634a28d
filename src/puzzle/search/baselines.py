"""What one does without the search, on the same library, costs and bounds: each baseline one small function."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from puzzle.artefacts import Bounds, Solution
from puzzle.errors import PuzzleError
from puzzle.search.exact import beats, best, broken, evaluated
from puzzle.search.tables import Tables

DROPPED = {"none+none", "none"}
"""Names of an empty layer."""


def solve_baseline(tables: Tables, name: str, seed: int = 0) -> Solution:
    """The architecture that a baseline finds within the target's bounds, unproven; `seed` is that of `random`.

    Raises:
        PuzzleError: there is no such baseline, or it finds nothing within the bounds; the search itself still may.
    """
    if name not in BASELINES:
        raise PuzzleError(f"baseline {name!r} is unknown; use one of {', '.join(BASELINES)}")
    if not any(_cost_bounds(tables)):
        raise PuzzleError("target: no cost is bounded; a baseline needs that, for example `throughput: 2x`")
    found = random(tables, seed) if name == "random" else BASELINES[name](tables)
    if found is None:
        raise PuzzleError(f"baseline {name}: it finds nothing within the target; loosen the target or take another")
    return found


def random(tables: Tables, seed: int = 0) -> Solution | None:
    """A random architecture within the bounds, whatever the scores say (paper section F.2.4).

    The optimum over Gumbel noise, for which every architecture is equally likely where no bound binds.
    """
    return _most(tables, np.random.default_rng(seed).gumbel(size=len(tables.known_scores.rows)).tolist())


def greedy(tables: Tables) -> Solution | None:
    """A budget for each layer, spent one after another (paper section F.2.2).

    Each bound is split equally over the layers; the easiest layer, of lowest mean score, chooses first. Each takes the
    block of lowest score within its budget, and what it leaves over is the next one's. Where nothing fits, it takes
    what overdraws least, and the next ones have less.
    """

    def proposals() -> Iterator[Sequence[str]]:
        for choices in itertools.product(*tables.choices):
            rows = [row for each, its in zip(choices, _cost_bounds(tables), strict=True) for row in each.rows(its)]
            limits, terms = np.array([row.limit for row in rows]), np.stack([row.terms for row in rows], axis=1)
            scores = choices[0].terms["score"]
            positions = [np.flatnonzero(tables.group_of == group) for group in range(len(tables.groups))]
            chosen, budget = np.zeros(len(positions), dtype=np.int64), np.zeros(len(limits))
            for group in np.argsort([scores[entries].mean() for entries in positions], kind="stable"):
                entries = positions[group]
                budget += limits * len(tables.groups[group].layers) / tables.scores.num_layers
                overdrawn = np.maximum(terms[entries] - budget, 0).max(axis=1)
                chosen[group] = entries[np.lexsort((scores[entries], overdrawn))[0]]
                budget -= terms[chosen[group]]
            yield tables.architecture(chosen)

    return _best_of(tables, proposals())


def max_parameters(tables: Tables) -> Solution | None:
    """As many parameters as the bounds allow, whatever the scores say (paper section F.2.3)."""
    costs = tables.costs
    any_size = costs.batch_sizes[0]  # parameters are the same at all
    return _most(tables, [costs.block(row.layer, row.block, any_size).params for row in tables.known_scores.rows])


def depth(tables: Tables) -> Solution | None:
    """Whole layers dropped by block influence, as few as it takes, and nothing else changed (arXiv 2403.03853)."""
    dropped, parents = empty_layers(tables), tables.scores.parent_blocks
    empty = (dict(dropped[:count]) for count in range(len(dropped) + 1))
    return _best_of(tables, ([its.get(layer, own) for layer, own in enumerate(parents)] for its in empty))


def one_block(tables: Tables) -> Solution | None:
    """The same block in every layer (Minitron, arXiv 2407.14679); if that is not enough, layers go as in `depth`."""
    layers, dropped = range(tables.scores.num_layers), empty_layers(tables)
    every = [{row.block for row in tables.known_scores.layer(layer)} - DROPPED for layer in layers]
    for count in range(min(len(dropped), len(layers) - 1) + 1):
        empty = dict(dropped[:count])
        common = sorted(set.intersection(*(every[layer] for layer in layers if layer not in empty)))
        architectures = ([empty.get(layer, block) for layer in layers] for block in common)
        if found := _best_of(tables, architectures):
            return found
    return None


BASELINES: dict[str, Callable[[Tables], Solution | None]] = {
    "random": random,
    "greedy": greedy,
    "max-parameters": max_parameters,
    "one-block": one_block,
    "depth": depth,
}
"""Each gives None where it finds nothing within the bounds."""


def empty_layers(tables: Tables) -> list[tuple[int, str]]:
    """Layers that can be dropped, with the block that does it, by influence, or without influences by score."""
    empty = {row.layer: row.block for row in tables.known_scores.rows if row.block in DROPPED}
    score = tables.settings.score
    values = {layer: tables.scores.value(layer, block, score) for layer, block in empty.items()}
    if tables.influence:
        values = dict(enumerate(tables.influence()))
    return sorted(empty.items(), key=lambda item: values[item[0]])


def _cost_bounds(tables: Tables) -> list[Bounds]:
    """Of each scenario."""
    return [{key: bound for key, bound in each.items() if key != "score"} for each in tables.bounds]


def _best_of(tables: Tables, architectures: Iterable[Sequence[str]]) -> Solution | None:
    """The best, at any batch sizes, that meets all bounds and keeps to `search.fix`, `forbid` and `equal`."""
    found: Solution | None = None
    sizes = list(itertools.product(*(demand.costs.batch_sizes for demand in tables.demands)))
    for blocks in architectures:
        if all({blocks[layer] for layer in layers} in [{name} for name in names] for layers, names in tables.groups):
            for solution in (evaluated(tables, blocks, batch_sizes) for batch_sizes in sizes):
                if not broken(solution, tables.bounds) and beats(solution, found):
                    found = solution
    return found


def _most(tables: Tables, worth: Sequence[float]) -> Solution | None:
    """The highest sum over layers of what each row of the score table is worth, within the same bounds on costs."""
    parents, every = tables.scores.parent_blocks, [*zip(tables.known_scores.rows, worth, strict=True)]
    own = {row.layer: value for row, value in every if row.block == parents[row.layer]}
    # The parent's rows come first: its block is the first of its layer with a score of 0.
    rows = sorted(every, key=lambda each: each[0].block != parents[each[0].layer])
    worths = tuple(replace(row, kl=own[row.layer] - value) for row, value in rows)
    scores = replace(tables.known_scores, rows=worths, noise=0.0)
    settings = tables.settings.model_copy(update={"score": "kl"})
    found = best(replace(tables, scores=scores, settings=settings), _cost_bounds(tables))
    return found and _best_of(tables, [found.blocks])
