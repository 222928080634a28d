"""The uniform baseline: exact counts, measured times, layers dropped only where narrowing is not enough."""

from collections.abc import Sequence

import pytest

import puzzle.baseline
from puzzle.artefacts import Bounds, CostTable, ScoreTable, Solution
from puzzle.baseline import uniform_architecture, uniform_space
from puzzle.costs import Sample
from puzzle.parents import Parent
from puzzle.pipeline import Pipeline
from puzzle.runs import Run
from puzzle.variants import Architecture, BlockVariant

INFLUENCE = (0.4, 0.1, 0.3, 0.2)


def _child(costs: CostTable, block: str, **bounds: float) -> Solution:
    blocks = (block,) * 4
    return Solution(
        blocks=blocks,
        batch_size=2,
        score=0.0,
        predicted=dict(costs.totals(blocks, 2).as_dict()),
        parent={},
        asked=Bounds(**bounds),
        bounds=Bounds(**bounds),
        proof=None,
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Measured times are the predicted ones, times a factor for architectures with four KV heads."""
    factors = {"kv4": 1.0}

    def time_architectures(
        config: object, models: Sequence[tuple[Architecture, int]], costs: CostTable, repeats: int
    ) -> list[Sample]:
        def one(architecture: Architecture) -> Sample:
            names = [block.name for block in architecture.blocks]
            factor = factors["kv4"] if any("kv4" in name for name in names) else 1.0
            decode_ms = costs.totals(names, 2).cost.decode_ms * factor
            return Sample(prefill_ms=0.0, decode_ms=decode_ms)

        return [one(architecture) for architecture, _ in models]

    monkeypatch.setattr(puzzle.baseline, "time_architectures", time_architectures)
    return factors


def _names(run: Run, pipeline: Pipeline, toy_scores: ScoreTable, toy_costs: CostTable, child: Solution) -> list[str]:
    parent: Parent = pipeline.parent
    found = uniform_architecture(run, parent, pipeline.space, toy_scores, toy_costs, INFLUENCE, child)
    return [block.name for block in found.blocks]


def test_the_widest_that_keeps_up_is_taken(
    pico_run: Run, pico_pipeline: Pipeline, toy_scores: ScoreTable, toy_costs: CostTable, measured: dict[str, float]
) -> None:
    child = _child(toy_costs, "kv2+w48", throughput_tok_s=1.0)
    names = _names(pico_run, pico_pipeline, toy_scores, toy_costs, child)
    # As many parameters with all heads kept cost less KL here: heads weigh twice.
    heads, width = names[0].split("+w")
    assert len(set(names)) == 1
    assert heads == "kv4"
    own = toy_costs.totals(child.blocks, 2).request_ms
    per_channel = 3 * 32 * 1e-3 * 4
    at_32 = toy_costs.totals(("kv4+w32",) * 4, 2).request_ms
    used = at_32 + (int(width) - 32) * per_channel
    assert own - 4 * per_channel < used <= own


def test_what_is_measured_counts_not_what_is_predicted(
    pico_run: Run, pico_pipeline: Pipeline, toy_scores: ScoreTable, toy_costs: CostTable, measured: dict[str, float]
) -> None:
    measured["kv4"] = 2.0
    # Another bound than in the test above, for the stage's result is kept.
    child = _child(toy_costs, "kv2+w48", throughput_tok_s=2.0)
    names = _names(pico_run, pico_pipeline, toy_scores, toy_costs, child)
    assert names == ["kv2+w48"] * 4


def test_layers_are_dropped_where_narrowing_is_not_enough(
    pico_run: Run, pico_pipeline: Pipeline, toy_scores: ScoreTable, toy_costs: CostTable, measured: dict[str, float]
) -> None:
    child = _child(toy_costs, "none+w48", throughput_tok_s=1.0)
    names = _names(pico_run, pico_pipeline, toy_scores, toy_costs, child)
    dropped = [layer for layer, name in enumerate(names) if name == "none+none"]
    assert dropped
    assert dropped == sorted(sorted(range(4), key=lambda layer: INFLUENCE[layer])[: len(dropped)])
    assert toy_costs.totals(child.blocks, 2).request_ms >= 0.9 * sum(
        toy_costs.block(i, "kv1+w8", 2).decode_ms for i in range(4) if i not in dropped
    )


def test_sizes_are_met_by_exact_count(
    pico_run: Run, pico_pipeline: Pipeline, toy_scores: ScoreTable, toy_costs: CostTable
) -> None:
    config = pico_pipeline.parent.config
    bound = 0.7 * pico_pipeline.parent.num_params
    child = _child(toy_costs, "kv2+w32", params=bound)
    found = uniform_architecture(
        pico_run, pico_pipeline.parent, pico_pipeline.space, toy_scores, toy_costs, INFLUENCE, child
    )
    outer = pico_pipeline.parent.num_params - sum(
        subblock.num_params(config)
        for block in pico_pipeline.parent.architecture.blocks
        for subblock in (block.attention, block.ffn)
    )
    used = outer + sum(
        subblock.num_params(config) for block in found.blocks for subblock in (block.attention, block.ffn)
    )
    one_step_wider = used + 4 * 4 * 3 * 32
    assert used <= bound < one_step_wider


def test_the_space_holds_the_parents_blocks_and_the_uniform_ones(pico_pipeline: Pipeline) -> None:
    parent = pico_pipeline.parent
    uniform = Architecture(tuple(BlockVariant.parse(name) for name in ("kv2+w20", "none+none", "kv2+w20", "kv4+w64")))
    space = uniform_space(parent, uniform)
    assert [len(layer.blocks()) for layer in space.layers] == [4, 4, 4, 1]
    assert all(layer.parent == own for layer, own in zip(space.layers, parent.architecture.blocks, strict=True))
