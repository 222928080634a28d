"""The honest baseline of a run: all layers alike, and as fast as the child when both are measured.

What people do without a search: one number of KV heads and one FFN width for every layer, and where narrowing alone is
not enough, layers dropped whole, those of lowest block influence first. Widths are not bound to the library's: costs
and scores between its widths are interpolated, and the blocks that are chosen are then trained like the library's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from puzzle.artefacts import CostRow, CostTable, ScoreRow, Solution
from puzzle.costs import subblock_memory
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.quantities import COSTS
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.runs import Run, digest, read_parsed, write_text
from puzzle.search.baselines import DROPPED, uniform
from puzzle.search.fit import TIMES
from puzzle.search.table_file import score_row
from puzzle.search.tables import Tables
from puzzle.search.timing import time_beside, time_bounds
from puzzle.stages import UNIFORM
from puzzle.units import Amount
from puzzle.variants import Architecture, LayerSpace, Space, Subblock, Variant

_TIMINGS = 5
_NEAR = 0.97
"""Share of the child's measured time that is near enough."""


def uniform_solution(
    run: Run, parent: Parent, space: Space, tables: Tables, influence: Sequence[float], child: Solution
) -> Solution:
    """The uniform architecture of the lowest estimated score that meets the child's bounds.

    Bounds on sizes are met by exact count. Where a speed or a time is bounded, it must be as fast as the child, both
    timed on the engine in turns.

    Args:
        influence: of each layer.

    Raises:
        PuzzleError: no uniform architecture gets there.
    """
    folder = run.open(
        UNIFORM,
        parent=parent,
        space=[[variant.name for variant in (*layer.attention, *layer.ffn)] for layer in space.layers],
        scores=digest(tables.scores.to_json()),
        costs=digest(tables.costs.to_json()),
        influence=list(influence),
        child=digest(child.to_json()),
    )
    file = folder.path / "solution.json"
    if not folder.done:
        candidates = _uniform_tables(tables, parent.config, space, child.batch_size)
        found = _as_fast(run, parent.config, replace(candidates, influence=lambda: influence), child)
        solution = replace(found, parent=child.parent, asked=child.asked, bounds=child.bounds)
        write_text(file, solution.to_json())
        folder.commit()
    return read_parsed(file, Solution.from_json)


def space_of(parent: Parent, blocks: Sequence[str]) -> Space:
    """The parent's own blocks and these."""
    pairs = zip(parent.architecture.blocks, Architecture.parse(blocks).blocks, strict=True)
    layers = [zip(own.subblocks, block.subblocks, strict=True) for own, block in pairs]
    return Space(tuple(LayerSpace(*(tuple(dict.fromkeys(variants)) for variants in layer)) for layer in layers))


def _as_fast(run: Run, config: PuzzleConfig, tables: Tables, child: Solution) -> Solution:
    """The best uniform architecture that is as fast as the child: the bound on its predicted time is moved until the
    measured time is near the child's.
    """
    sizes = {
        COSTS[key].setting: Amount(bound, relative=False, text=f"{bound:g}")
        for key, bound in child.bounds.items()
        if key in COSTS and COSTS[key].exact
    }
    if not time_bounds(child.bounds):
        return _found(tables, sizes)
    reference = child.blocks, child.batch_size
    limit_ms = tables.costs.totals(child.blocks, child.batch_size).request_ms
    timed: dict[tuple[str, ...], tuple[float, Solution]] = {}
    while len(timed) < _TIMINGS:
        found = _found(tables, sizes | {"latency": Amount(limit_ms, relative=False, text=f"{limit_ms:g}ms")})
        if found.blocks in timed:
            break
        asked = TargetSettings.model_validate({"latency": "1x"})
        ratio = time_beside(config, tables.costs, asked, reference, (found.blocks, child.batch_size)).utilisation
        timed[found.blocks] = ratio, found
        if _NEAR <= ratio <= 1:
            break
        limit_ms = found.predicted["request_ms"] * (1 + _NEAR) / 2 / ratio
    as_fast = [found for ratio, found in timed.values() if ratio <= 1]
    if not as_fast:
        ratio, fastest = min(timed.values(), key=lambda each: each[0])
        run.log_warning(f"the uniform child takes {ratio - 1:.1%} more time than the child as measured")
        return fastest
    return min(as_fast, key=lambda found: found.score)


def _found(tables: Tables, bounds: dict[str, Amount]) -> Solution:
    found = uniform(replace(tables, target=TargetSettings.model_validate(bounds)))
    if found is None:
        raise PuzzleError(
            "evaluate.uniform_baseline: no uniform child is as small and as fast as the child; set it to false"
        )
    return found


def _uniform_tables(tables: Tables, config: PuzzleConfig, space: Space, batch_size: int) -> Tables:
    """The blocks that a uniform child may have: of the parent's kinds, in every number of KV heads of the library and
    every FFN width, what lies between the library's interpolated; and empty layers.
    """
    attentions, widths = _sized(space, config, "attention"), _sized(space, config, "ffn")
    if not attentions or not widths:
        raise PuzzleError("evaluate.uniform_baseline: the layers have no sizes in common; set it to false")
    largest = widths[-1]
    step = math.gcd(*(variant.size or 0 for variant in (largest, *largest.alternatives(config))))
    between = largest.alternatives(config, range(widths[0].size or step, largest.size or 0, step))
    ffns = list(dict.fromkeys([*widths, *between]))
    return Tables(
        scores=replace(tables.scores, rows=tuple(_score_rows(tables, attentions, widths, ffns))),
        costs=_with_widths(tables.costs, config, widths, ffns, batch_size),
        settings=SearchSettings(margin=0, gap=tables.settings.gap, time_limit_s=tables.settings.time_limit_s),
    )


def _sized(space: Space, config: PuzzleConfig, subblock: Subblock) -> list[Variant]:
    """The parent's kind in the sizes that every layer has, ascending."""
    layers = [layer.subblock(subblock) for layer in space.layers]
    own = max((layer[0] for layer in layers), key=lambda variant: variant.size or 0)
    common = set.intersection(*map(set, layers))
    sized = [each for each in common if each.size and each in (own, *own.alternatives(config, [each.size]))]
    return sorted(sized, key=lambda variant: variant.size or 0)


def _score_rows(
    tables: Tables, attentions: Sequence[Variant], widths: Sequence[Variant], ffns: Sequence[Variant]
) -> Iterator[ScoreRow]:
    """The parent's own block of each layer, the empty one, and every uniform one.

    Of a search by `task` the KL: uniform blocks may have no task score.
    """
    score = "kl" if tables.settings.score == "task" else tables.settings.score
    for layer, parent in enumerate(tables.parent):
        yield score_row(layer, parent, 0.0)
        known = {row.block for row in tables.scores.layer(layer)}
        for block in known.intersection(DROPPED):
            yield score_row(layer, block, tables.scores.value(layer, block, score))
        for attention in attentions:
            anchors = [f"{attention}+{ffn}" for ffn in widths]
            if not known.issuperset(anchors):
                continue  # a score was not finite
            values = [tables.scores.value(layer, block, score) for block in anchors]
            for ffn in ffns:
                if f"{attention}+{ffn}" != parent:
                    yield score_row(layer, f"{attention}+{ffn}", _interpolated(ffn, widths, values))


def _with_widths(
    costs: CostTable, config: PuzzleConfig, widths: Sequence[Variant], ffns: Sequence[Variant], batch_size: int
) -> CostTable:
    """The costs at one batch size, with rows for FFN widths between the table's: sizes counted, times interpolated."""
    scenario, rows = costs.scenario, [row for row in costs.rows if row.batch_size == batch_size]
    known = {(row.layer, row.variant): row for row in rows if row.part == "ffn"}
    sizes = {
        ffn: subblock_memory(ffn, config, getattr(torch, scenario.dtype), scenario.total_tokens)
        for ffn in ffns
        if ffn not in widths
    }

    def times(ffn: Variant, anchors: Sequence[CostRow]) -> dict[str, Any]:
        return {name: _interpolated(ffn, widths, [getattr(row, name) for row in anchors]) for name in TIMES}

    for layer in range(max(row.layer for row in rows) + 1):
        anchors = [known[layer, ffn.name] for ffn in widths]
        for ffn, size in sizes.items():
            rows.append(
                CostRow(
                    layer=layer, part="ffn", variant=ffn.name, batch_size=batch_size, **vars(size) | times(ffn, anchors)
                )
            )
    return replace(costs, batch_sizes=(batch_size,), rows=tuple(rows))


def _interpolated(variant: Variant, anchors: Sequence[Variant], values: Sequence[float]) -> float:
    return float(np.interp(variant.size or 0, [anchor.size or 0 for anchor in anchors], values))
