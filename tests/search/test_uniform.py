"""The uniform child of a run: exact counts, measured times, layers dropped only where narrowing is not enough."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.search.test_until_met import Clock, clock

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.costs.table import subblock_memory
from puzzle.pipeline import Pipeline
from puzzle.recipe import SearchSettings
from puzzle.runs import Run
from puzzle.search import Tables, space_of, uniform_solution
from puzzle.variants import Architecture

INFLUENCE = (0.4, 0.1, 0.3, 0.2)
__all__ = ["clock"]


@pytest.fixture
def run(pico_run: Run, tmp_path: Path) -> Run:
    return replace(pico_run, path=tmp_path, used=[])


@pytest.fixture
def tables(toy_scores: ScoreTable, toy_costs: CostTable) -> Tables:
    return Tables(scores=toy_scores, costs=toy_costs, influence=lambda: INFLUENCE)


def child_of(costs: CostTable, block: str, **bounds: float) -> Solution:
    return Solution(
        blocks=(block,) * 4,
        batch_size=2,
        score=0.0,
        predicted=costs.totals((block,) * 4, 2).as_dict(),
        parent={},
        asked=bounds,
        bounds=bounds,
        proof=None,
    )


def found(run: Run, pipeline: Pipeline, tables: Tables, child: Solution) -> Solution:
    return uniform_solution(run, pipeline.parent, pipeline.space, tables, child)


def test_it_is_as_fast_as_the_child_with_any_width(
    run: Run, pico_pipeline: Pipeline, tables: Tables, clock: Clock
) -> None:
    child = child_of(tables.costs, "kv1+w48", throughput_tok_s=1.0)
    solution = found(run, pico_pipeline, tables, child)
    (block,) = set(solution.blocks)
    # As many parameters with all heads kept cost less KL here: heads weigh twice.
    heads, width = block.split("+w")
    assert heads == "kv4"
    assert int(width) not in (64, 48, 32, 16, 8)
    assert 0.9 * child.predicted["request_ms"] < solution.predicted["request_ms"] <= child.predicted["request_ms"]
    assert found(run, pico_pipeline, tables, child) == solution


def test_what_is_measured_counts_not_what_is_predicted(
    run: Run, pico_pipeline: Pipeline, tables: Tables, clock: Clock
) -> None:
    """Uniform children take a third longer than predicted beside the child."""
    child = child_of(tables.costs, "kv2+w48", throughput_tok_s=1.0)
    right = found(run, pico_pipeline, tables, child)
    clock.child = 1.3
    slower = found(replace(run, path=run.path / "other"), pico_pipeline, tables, child)
    assert slower.predicted["request_ms"] * 1.3 <= child.predicted["request_ms"]
    assert slower.score > right.score


def test_layers_are_dropped_where_narrowing_is_not_enough(
    run: Run, pico_pipeline: Pipeline, tables: Tables, clock: Clock
) -> None:
    child = child_of(tables.costs, "none+w16", throughput_tok_s=1.0)
    solution = found(run, pico_pipeline, tables, child)
    dropped = {layer for layer, block in enumerate(solution.blocks) if block == "none+none"}
    assert dropped
    assert dropped == set(sorted(range(4), key=lambda layer: INFLUENCE[layer])[: len(dropped)])
    assert solution.predicted["request_ms"] <= child.predicted["request_ms"]


def test_sizes_are_met_by_exact_count(run: Run, pico_pipeline: Pipeline, tables: Tables, clock: Clock) -> None:
    config = pico_pipeline.parent.config
    bound = int(0.7 * tables.costs.totals(pico_pipeline.parent.architecture.names, 2).cost.params)
    solution = found(run, pico_pipeline, tables, child_of(tables.costs, "kv2+w32", params=bound))
    dtype, tokens = torch.float32, tables.costs.scenario.total_tokens
    variants = [each for block in Architecture.parse(solution.blocks).blocks for each in block.subblocks]
    counted = sum((subblock_memory(each, config, dtype, tokens).params for each in variants), 0)
    used = counted  # in the toy table nothing is fixed
    one_step_wider = used + 4 * 4 * 3 * 32
    assert used == solution.predicted["params"] <= bound < one_step_wider
    assert clock.rounds == [], "sizes are not timed"


def test_another_score_gives_another_baseline(run: Run, pico_pipeline: Pipeline, tables: Tables, clock: Clock) -> None:
    """The stage's address covers the score that is added up."""
    child = child_of(tables.costs, "kv2+w48", throughput_tok_s=1.0)
    found(run, pico_pipeline, tables, child)
    settings = SearchSettings(score="cosine")
    other = replace(run, recipe=run.recipe.model_copy(update={"search": settings}))
    found(other, pico_pipeline, replace(tables, settings=settings), child)
    assert len(list(run.path.glob("stages/uniform-*/manifest.json"))) == 2


def test_the_space_holds_the_parents_blocks_and_the_uniform_ones(pico_pipeline: Pipeline) -> None:
    parent = pico_pipeline.parent
    space = space_of(parent, ("kv2+w20", "none+none", "kv2+w20", "kv4+w64"))
    assert [len(layer.blocks()) for layer in space.layers] == [4, 4, 4, 1]
    assert all(layer.parent == own for layer, own in zip(space.layers, parent.architecture.blocks, strict=True))
