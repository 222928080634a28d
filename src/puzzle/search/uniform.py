"""The honest baseline of a run: all layers alike, and as fast as the child when both are measured.

What people do without a search: one number of KV heads and one FFN width for every layer, and where narrowing alone is
not enough, layers dropped whole, those of lowest block influence first. Widths are not bound to the library's: costs
and scores between its widths are interpolated, and the blocks that are chosen are then trained like the library's.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from puzzle.artefacts import Bounds, Cost, Solution, Totals
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.quantities import COSTS
from puzzle.recipe import SearchSettings, TargetSettings
from puzzle.runs import Run, digest, read_parsed, write_text
from puzzle.search.baselines import empty_layers
from puzzle.search.tables import Tables, violations
from puzzle.search.timing import TIMES, time_beside, time_bounds
from puzzle.stages import UNIFORM
from puzzle.variants import Architecture, LayerSpace, Space, Subblock, Variant

_NEAR = 0.97
"""Share of the child's measured time that is near enough."""


def uniform_solution(run: Run, parent: Parent, space: Space, tables: Tables, child: Solution) -> Solution:
    """The uniform architecture of the lowest estimated score that meets the child's bounds.

    Bounds on sizes are met by exact count. Where a speed or a time is bounded, it must be as fast as the child, both
    timed on the engine in turns. `tables` know the influence of each layer.

    Raises:
        PuzzleError: no uniform architecture gets there.
    """
    folder = run.open(
        UNIFORM,
        parent=parent,
        space=space.names,
        scores=digest(tables.scores.to_json()),
        costs=digest(tables.costs.to_json()),
        influence=list(tables.influence()) if tables.influence else [],
        child=digest(child.to_json()),
    )
    file = folder.path / "solution.json"
    if not folder.done:
        if tables.settings.score == "task":  # uniform blocks may have none: of such a search the KL
            tables = replace(tables, settings=SearchSettings())
        write_text(file, _as_fast(run, parent.config, space, tables, child).to_json())
        folder.commit()
    return read_parsed(file, Solution.from_json)


def space_of(parent: Parent, blocks: Sequence[str]) -> Space:
    """The parent's own blocks and these."""
    pairs = zip(parent.architecture.blocks, Architecture.parse(blocks).blocks, strict=True)
    layers = [zip(own.subblocks, block.subblocks, strict=True) for own, block in pairs]
    return Space(tuple(LayerSpace(*(tuple(dict.fromkeys(variants)) for variants in layer)) for layer in layers))


def _as_fast(run: Run, config: PuzzleConfig, space: Space, tables: Tables, child: Solution) -> Solution:
    """The best that is as fast as the child: the bound on predicted times moves until measured ones are near."""
    sizes = {key: bound for key, bound in child.bounds.items() if key in COSTS and COSTS[key].exact}
    if not time_bounds(child.bounds):
        return _best(config, space, tables, child, sizes)
    limit_ms = tables.costs.totals(child.blocks, child.batch_size).request_ms
    scenario, asked = tables.costs.scenario, TargetSettings.model_validate({"latency": "1x"})
    nothing = Totals(batch_size=child.batch_size, generated_tokens=scenario.generated_tokens, cost=Cost())
    timed: dict[tuple[str, ...], tuple[float, Solution]] = {}
    while len(timed) < 5:
        found = _best(config, space, tables, child, sizes | {"request_ms": limit_ms})
        if found.blocks in timed:
            break
        models = (child.blocks, child.batch_size), (found.blocks, child.batch_size)
        ratio = time_beside(config, scenario, asked, models, [nothing, nothing]).utilisation
        timed[found.blocks] = ratio, found
        if _NEAR <= ratio <= 1:
            break
        limit_ms = found.predicted["request_ms"] * (1 + _NEAR) / 2 / ratio
    ratio, found = min(timed.values(), key=lambda each: (max(1.0, each[0]), each[1].score))
    if ratio > 1:
        run.log_warning(f"the uniform child takes {ratio - 1:.1%} more time than the child as measured")
    return found


def _best(config: PuzzleConfig, space: Space, tables: Tables, child: Solution, limits: Bounds) -> Solution:
    """The uniform architecture of the lowest score within `limits`, with as few layers dropped as that takes.

    Of the parent's kinds: every attention variant of the library, and every FFN width; between the library's widths
    totals are interpolated.
    """
    attentions, anchors = _sized(space, config, "attention"), _sized(space, config, "ffn")
    if not attentions or not anchors:
        raise PuzzleError("evaluate.uniform_baseline: the layers have no sizes in common; set it to false")
    largest, sizes = anchors[-1], [ffn.size or 0 for ffn in anchors]
    step = math.gcd(sizes[-1], *(variant.size or 0 for variant in largest.alternatives(config)))
    ffns = dict.fromkeys([*anchors, *largest.alternatives(config, range(sizes[0], sizes[-1], step))])
    dropped, layers = empty_layers(tables), range(tables.scores.num_layers)
    generated = tables.costs.scenario.generated_tokens
    for count in range(min(len(dropped), len(layers) - 1) + 1):
        empty, within = dict(dropped[:count]), []
        for attention in attentions:
            blocks = {ffn: tuple(empty.get(layer, f"{attention}+{ffn}") for layer in layers) for ffn in ffns}
            try:
                scores = [tables.scores.total(blocks[ffn], tables.settings.score) for ffn in anchors]
            except KeyError:
                continue  # one was not finite
            costs = [vars(tables.costs.totals(blocks[ffn], child.batch_size).cost) for ffn in anchors]
            for ffn in ffns:
                # Sizes are linear in the width, so that they are exact.
                at = partial(np.interp, ffn.size or 0, sizes)
                cost: dict[str, Any] = {name: float(at([each[name] for each in costs])) for name in costs[0]}
                cost |= {name: round(value) for name, value in cost.items() if name not in TIMES}
                totals = Totals(batch_size=child.batch_size, generated_tokens=generated, cost=Cost(**cost)).as_dict()
                if not violations(totals, limits):
                    found = replace(child, blocks=blocks[ffn], score=float(at(scores)), predicted=totals)
                    within.append(replace(found, proof=None, further=()))
        if within:
            return min(within, key=lambda each: each.score)
    raise PuzzleError("evaluate.uniform_baseline: no uniform child is as small and fast as the child; set it to false")


def _sized(space: Space, config: PuzzleConfig, subblock: Subblock) -> list[Variant]:
    """The parent's kind in the sizes that every layer has, ascending."""
    layers = [layer.subblock(subblock) for layer in space.layers]
    own = max((layer[0] for layer in layers), key=lambda variant: variant.size or 0)
    common = set.intersection(*map(set, layers))
    sized = [each for each in common if each.size and each in (own, *own.alternatives(config, [each.size]))]
    return sorted(sized, key=lambda variant: variant.size or 0)
