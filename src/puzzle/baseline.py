"""The honest baseline: all layers alike, and as fast as the child when both are measured.

What people do without a search: one number of KV heads and one FFN width for every layer, and where narrowing alone is
not enough, layers dropped whole, those of lowest block influence first. Widths are not bound to the library's: the
widest that keeps up with the child is taken, and its blocks are then initialised and trained like the library's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from puzzle.artefacts import CostTable, ScoreName, ScoreTable, Solution, Totals
from puzzle.costs import Sample, fixed_memory, subblock_memory, summarise, time_models
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.runs import Run, digest
from puzzle.variants import (
    Architecture,
    BlockVariant,
    GatedFFN,
    GroupedQuery,
    LayerSpace,
    Space,
    Variant,
    hardware_multiple,
)

_DROPPED = BlockVariant.parse("none+none")
_NEAR = 1.5
_MEASURED_WIDTHS = 3
"""For each number of KV heads, so many widths are measured whose predicted times are nearest to the child's and within
this factor of it; the others are taken as predicted, times the error found for these."""
_ROUNDS = 3


def time_architectures(
    config: PuzzleConfig, models: Sequence[tuple[Architecture, int]], costs: CostTable, rounds: int
) -> list[Sample]:
    configs = [(architecture.configure(config), batch_size) for architecture, batch_size in models]
    return [summarise(each) for each in time_models(configs, costs.scenario, rounds, enough=lambda samples: True)]


def uniform_architecture(
    run: Run,
    parent: Parent,
    space: Space,
    scores: ScoreTable,
    costs: CostTable,
    influence: Sequence[float],
    child: Solution,
) -> Architecture:
    """The uniform architecture of the lowest estimated score that meets the child's bounds.

    Bounds on memory and parameters are met by exact count. Where a speed or a time is bounded, it must be as fast as
    the child, both timed on the engine in turns.

    Raises:
        PuzzleError: no uniform architecture gets there.
    """
    settings = {
        "influence": list(influence),
        "child": list(child.blocks),
        "bounds": child.bounds,
    }
    inputs = (digest(scores.to_json()), digest(costs.to_json()))
    stage = run.stage("uniform", version=1, settings=settings, inputs=inputs)
    if not stage.done:
        found = _Search(run, parent, space, scores, costs, child).best(influence)
        stage.commit(blocks=[block.name for block in found.blocks])
    return Architecture(tuple(BlockVariant.parse(name) for name in stage.facts["blocks"]))


def uniform_space(parent: Parent, architecture: Architecture) -> Space:
    """The space of the parent's own blocks and the architecture's."""
    pairs = zip(parent.architecture.blocks, architecture.blocks, strict=True)
    return Space(
        tuple(
            LayerSpace(
                tuple(dict.fromkeys((own.attention, block.attention))), tuple(dict.fromkeys((own.ffn, block.ffn)))
            )
            for own, block in pairs
        )
    )


@dataclass(frozen=True)
class _Search:
    run: Run
    parent: Parent
    space: Space
    scores: ScoreTable
    costs: CostTable
    child: Solution

    def best(self, influence: Sequence[float]) -> Architecture:
        """As few dropped layers as it takes; of the numbers of KV heads the one with the lowest estimated score."""
        rising = sorted(range(len(influence)), key=lambda layer: influence[layer])
        for count in range(len(rising)):
            dropped = frozenset(rising[:count])
            times_ms = self._times(dropped)
            found = [
                (self._score(heads, width, dropped), self._architecture(heads, width, dropped))
                for heads in times_ms
                if (width := self._widest(heads, dropped, times_ms[heads])) is not None
            ]
            if found:
                return min(found, key=lambda pair: pair[0])[1]
        raise PuzzleError(
            "evaluate.uniform_baseline: no uniform child is as small and as fast as the child; set it to false"
        )

    def _common(self, kind: type[GroupedQuery] | type[GatedFFN]) -> list[int]:
        """Sizes that every layer's space has, ascending."""
        sizes = [{_size(variant, kind) for variant in (*layer.attention, *layer.ffn)} for layer in self.space.layers]
        return sorted(size for size in set.intersection(*sizes) if size is not None)

    def _architecture(self, heads: int, width: int, dropped: frozenset[int]) -> Architecture:
        block = BlockVariant(GroupedQuery(heads), GatedFFN(width))
        return Architecture(tuple(_DROPPED if i in dropped else block for i in range(len(self.space.layers))))

    def _times(self, dropped: frozenset[int]) -> dict[int, dict[int, float]]:
        """Request times relative to the child's, by KV heads and the table's widths; 0 where no time is bounded."""
        points = [(heads, width) for heads in self._common(GroupedQuery) for width in self._common(GatedFFN)]
        architectures = {point: self._architecture(*point, dropped) for point in points}
        relative = dict.fromkeys(points, 0.0)
        if set(self.child.bounds) - {"memory_bytes", "params"}:
            own = self._predicted(self.child.blocks)
            relative = {
                point: self._predicted([block.name for block in architecture.blocks]) / own
                for point, architecture in architectures.items()
            }
            near = [point for heads in self._common(GroupedQuery) for point in self._near(heads, relative)]
            measured = dict(zip(near, self._measured([architectures[point] for point in near]), strict=True))
            relative = _corrected(relative, measured)
        widths = self._common(GatedFFN)
        return {heads: {width: relative[heads, width] for width in widths} for heads in self._common(GroupedQuery)}

    def _near(self, heads: int, relative: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
        """The points of `heads` whose widths lie about the one that is as fast as the child, if any is."""
        distances = {point: abs(math.log(ratio)) for point, ratio in relative.items() if point[0] == heads}
        nearest = sorted(distances, key=lambda point: distances[point])[:_MEASURED_WIDTHS]
        return [point for point in nearest if distances[point] < math.log(_NEAR)]

    def _predicted(self, blocks: Sequence[str]) -> float:
        return self.costs.totals(blocks, self.child.batch_size).request_ms

    def _measured(self, architectures: Sequence[Architecture]) -> list[float]:
        child = Architecture(tuple(BlockVariant.parse(name) for name in self.child.blocks))
        models = [(architecture, self.child.batch_size) for architecture in (child, *architectures)]
        times = time_architectures(self.parent.config, models, self.costs, _ROUNDS)
        steps = self.costs.scenario.generated_tokens - 1
        own, *others = (each.prefill_ms + steps * each.decode_ms for each in times)
        return [other / own for other in others]

    def _widest(self, heads: int, dropped: frozenset[int], times: Mapping[int, float]) -> int | None:
        """The largest width that keeps up with the child, times between the table's widths interpolated."""
        widths = sorted(times)
        step = hardware_multiple(widths[-1])
        grid = sorted({*range(step, widths[-1], step), *widths})
        reached = [
            width
            for width in grid
            if np.interp(width, widths, [times[each] for each in widths]) <= 1 and self._fits(heads, width, dropped)
        ]
        return reached[-1] if reached else None

    def _fits(self, heads: int, width: int, dropped: frozenset[int]) -> bool:
        """Whether memory and parameters are within the bounds, by exact count."""
        scenario, config = self.costs.scenario, self.parent.config
        dtype = getattr(torch, scenario.dtype)
        cost = fixed_memory(config, dtype)
        for block in self._architecture(heads, width, dropped).blocks:
            for variant in (block.attention, block.ffn):
                cost = cost + subblock_memory(variant, config, dtype, scenario.total_tokens)
        totals = Totals(batch_size=self.child.batch_size, generated_tokens=scenario.generated_tokens, cost=cost)
        bounds = self.child.bounds
        return totals.memory_bytes <= (bounds.get("memory_bytes", np.inf)) and cost.params <= (
            bounds.get("params", np.inf)
        )

    def _score(self, heads: int, width: int, dropped: frozenset[int]) -> float:
        """Sum of the layers' scores, between the table's widths interpolated.

        Of a search by `task` the KL: uniform blocks that lost the race have no task score.
        """
        asked = self.run.recipe.search.score
        score: ScoreName = "kl" if asked == "task" else asked
        widths = self._common(GatedFFN)
        total = 0.0
        for layer in range(len(self.space.layers)):
            if layer in dropped:
                total += self.scores.value(layer, _DROPPED.name, score)
            else:
                values = [self.scores.value(layer, f"kv{heads}+w{each}", score) for each in widths]
                total += float(np.interp(width, widths, values))
        return total


def _size(variant: Variant, kind: type[GroupedQuery] | type[GatedFFN]) -> int | None:
    """KV heads or width; None for another kind, and for attention with a window, which is no plain number of heads."""
    if isinstance(variant, GroupedQuery) and kind is GroupedQuery:
        return variant.num_key_value_heads if variant.window is None else None
    return variant.intermediate_size if isinstance(variant, GatedFFN) and kind is GatedFFN else None


def _corrected(
    predicted: Mapping[tuple[int, int], float], measured: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """Times by KV heads and width: the measured ones, and the predicted ones times the mean error for those heads."""
    corrected = dict(measured)
    for (heads, width), time in predicted.items():
        errors = [math.log(measured[point] / predicted[point]) for point in measured if point[0] == heads]
        factor = math.exp(sum(errors) / len(errors)) if errors else 1.0
        corrected.setdefault((heads, width), time * factor)
    return corrected
