"""What a search adds up, by the score that is asked for; and that it copes with scores below 0."""

from dataclasses import replace
from itertools import product

import pytest
from tests.search.conftest import cost_row, cost_table

from puzzle.artefacts import ScoreName, ScoreRow, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.recipe import SearchSettings
from puzzle.search import Tables
from puzzle.search.exact import best

BLOCKS = ("kv4+w64", "kv2+w64", "kv1+w64", "none+w64")
LOSS = ((3.0, 2.9, 3.2, 4.0), (3.0, 3.1, 2.8, 3.5))
"""Layer 0 is better off with two KV heads, layer 1 with one."""
TASK = ((0.5, 0.55, 0.4, None), (0.5, 0.45, 0.6, 0.1))


@pytest.fixture
def table() -> ScoreTable:
    rows = [
        ScoreRow(
            layer=layer,
            block=block,
            kl=0.25 * place,
            kl_se=0.0,
            lm_loss=LOSS[layer][place],
            top1_agreement=1.0,
            cosine=0.01 * place,
            sequences=8 if TASK[layer][place] is not None else 4,
            task=TASK[layer][place],
        )
        for layer, (place, block) in product(range(2), enumerate(BLOCKS))
    ]
    return ScoreTable(num_layers=2, sequences=8, sequence_length=8, rows=tuple(rows))


@pytest.mark.parametrize(("score", "value"), [("kl", 0.5), ("lm_loss", -0.2), ("cosine", 0.02), ("task", -0.1)])
def test_values(score: ScoreName, value: float, table: ScoreTable) -> None:
    assert table.value(1, "kv1+w64", score) == pytest.approx(value)
    assert table.value(1, "kv4+w64", score) == 0.0
    assert table.total(("kv4+w64", "kv1+w64"), score) == pytest.approx(value)
    assert table.total(("kv4+w64", "kv4+w64"), score) == 0.0


def test_a_block_without_a_task_score_cannot_be_chosen_by_task(table: ScoreTable) -> None:
    assert table.having("kl") is table
    assert {row.block for row in table.having("task").layer(0)} == {*BLOCKS[:3]}
    without = replace(table, rows=tuple(replace(row, task=None) for row in table.rows))
    with pytest.raises(PuzzleError, match=r"search.score: found task, .* set score.task"):
        without.having("task")


@pytest.mark.parametrize("score", ["kl", "lm_loss", "cosine", "task"])
@pytest.mark.parametrize("params", [8.0, 7.0, 5.0, 4.0])
def test_the_search_finds_the_best_sum_of_any_score(score: ScoreName, params: float, table: ScoreTable) -> None:
    rows = [cost_row(-1, "fixed", "", 1, prefill=1.0, decode=1.0)]
    for layer in range(2):
        rows += [cost_row(layer, "attention", block.split("+")[0], 1, params=4 - i) for i, block in enumerate(BLOCKS)]
        rows.append(cost_row(layer, "ffn", "w64", 1))
    costs = cost_table(rows, [1])
    tables = Tables(scores=table, costs=costs, settings=SearchSettings(score=score))
    solution = best(tables, [{"params": params}])
    there = {(row.layer, row.block) for row in table.having(score).rows}
    sums = [
        table.total(blocks, score)
        for blocks in product(BLOCKS, repeat=2)
        if all(pair in there for pair in enumerate(blocks)) and costs.totals(blocks, 1).cost.params <= params
    ]
    assert solution is not None
    assert solution.score == pytest.approx(min(sums), abs=1e-9)
    assert solution.proof is not None
    assert solution.proof.status == "optimal"
    assert 0 <= solution.proof.gap < 1e-6
