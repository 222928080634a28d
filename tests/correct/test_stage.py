"""The stage on a pico parent: what it finds, what it keeps, and that it goes on where it stood."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import puzzle.correct.whole
from puzzle.artefacts import WORTH, Correction, CostTable, ScoreTable, Solution
from puzzle.correct import TrueScore, correct
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.recipe import CorrectSettings, TargetSettings
from puzzle.runs import Run
from puzzle.search import evaluate_blocks, excesses, solve

Corrected = Callable[..., Correction | None]


@pytest.fixture
def solution(pico_scores: ScoreTable, toy_costs: CostTable, pico_run: Run) -> Solution:
    return solve(pico_scores, toy_costs, TargetSettings(throughput="1.7x"), pico_run.recipe.search)


@pytest.fixture
def corrected(
    tmp_path: Path,
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_library: Library,
    pico_scores: ScoreTable,
    toy_costs: CostTable,
    solution: Solution,
) -> Corrected:
    """The stage with these settings, in a folder of its own."""

    def run_stage(search: dict[str, Any] | None = None, **settings: Any) -> Correction | None:
        recipe = pico_run.recipe
        update = {
            "target": TargetSettings(throughput="1.7x"),
            "correct": recipe.correct.model_copy(update={"tokens": 256, "pool": 4, "rounds": 1} | settings),
            "search": recipe.search.model_copy(update=search or {}),
        }
        run = Run(tmp_path, recipe.model_copy(update=update))
        true = TrueScore(run, pico_parent, pico_data, pico_library)
        return correct(run, true, pico_parent, pico_data, pico_scores, toy_costs, solution)

    return run_stage


def test_it_ends_no_worse_and_within_the_bounds_by_the_raw_tables(
    corrected: Corrected, pico_scores: ScoreTable, toy_costs: CostTable, solution: Solution
) -> None:
    found = corrected(depth=1, pairs=3)
    assert found is not None
    values = {judged.blocks: judged.whole.kl for judged in found.judged}
    assert found.ranked[-1] == solution
    assert found.judged[0].blocks == solution.blocks
    assert min(values.values()) == found.steps[-1].after
    worth = min(values.values()) < (1 - WORTH) * values[solution.blocks]
    assert values[found.ranked[0].blocks] == (min(values.values()) if worth else values[solution.blocks])
    for each in found.ranked:
        score, totals = evaluate_blocks(pico_scores, toy_costs, each.blocks, each.batch_size)
        assert score == pytest.approx(each.score)
        assert not excesses(totals, solution.bounds)
    assert found.tokens == 256
    assert [step.name for step in found.steps] == ["pool", "depth", "rounds", "pairs"]
    assert found.tau is not None
    assert -1 <= found.tau <= 1
    assert corrected(depth=1, pairs=3) == found


def test_one_cut_off_anywhere_ends_the_same(corrected: Corrected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzle.correct.whole, "_AT_ONCE", 16)
    write, cuts = puzzle.correct.whole.write_json, 0

    def write_and_die(path: Path, value: Any) -> None:
        write(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(puzzle.correct.whole, "write_json", write_and_die)
    while True:
        try:
            found = corrected()
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts > 3
    monkeypatch.setattr(puzzle.correct.whole, "write_json", write)
    again = corrected(pairs=1)  # another stage, the same true scores
    assert found is not None
    assert again is not None
    assert again.judged[: len(found.judged)] == found.judged


def test_finalists_are_halved_and_the_last_one_leads(
    corrected: Corrected, monkeypatch: pytest.MonkeyPatch, solution: Solution
) -> None:
    """With a GKD that turns the order round, as it may, and one that keeps it."""
    sign = -1
    trained: list[tuple[tuple[str, ...], int]] = []

    def best(run: Run, parent: Parent, data: TokenData, library: Library, blocks: tuple[str, ...], tokens: int) -> Any:
        trained.append((blocks, tokens))
        order = [judged.blocks for judged in sorted(plain.judged, key=lambda judged: judged.whole.kl)]
        return puzzle.correct.finalists.Finalist(blocks=blocks, tokens=tokens, validation_kl=sign * order.index(blocks))

    plain = corrected(pool=8)
    assert plain is not None
    count = min(4, len(plain.ranked))
    assert count > 1
    monkeypatch.setattr(puzzle.correct.finalists, "_trained", best)
    found = corrected(pool=8, finalists=4, finalist_tokens=100)
    assert found is not None
    assert [tokens for _, tokens in trained][:count] == [100] * count
    entrants = {each.blocks for each in (*plain.ranked[: count - 1], solution)}
    assert {blocks for blocks, _ in trained} == entrants, "the search's own is one of them"
    assert found.finalists[-1].blocks == found.ranked[0].blocks == solution.blocks
    assert found.ranked == (solution,), "nothing stands behind the search's own"
    sign = 1
    kept = corrected(pool=8, finalists=4, finalist_tokens=101)
    assert kept is not None
    assert kept.finalists[-1].blocks == kept.ranked[0].blocks == plain.ranked[0].blocks
    assert kept.ranked[-1] == solution


def test_finalists_go_through_short_gkd(corrected: Corrected, tmp_path: Path) -> None:
    found = corrected(pool=8, rounds=0, finalists=2, finalist_tokens=512)
    assert found is not None
    assert len(found.finalists) == 2
    assert len(list(tmp_path.glob("stages/distil-*/manifest.json"))) == 2
    assert found.finalists[0].validation_kl >= found.finalists[1].validation_kl
    before = next(judged.whole.kl for judged in found.judged if judged.blocks == found.finalists[1].blocks)
    assert 0 < found.finalists[1].validation_kl < 2 * before


def test_nothing_is_compared_where_the_recipe_says_so(corrected: Corrected, tmp_path: Path) -> None:
    assert corrected(tokens=0) is None
    assert corrected(search={"score": "task"}) is None
    assert corrected(search={"objective": "latency"}) is None
    assert not list(tmp_path.iterdir())


def test_another_score_is_what_is_lowered(
    corrected: Corrected, pico_scores: ScoreTable, toy_costs: CostTable, pico_run: Run, solution: Solution
) -> None:
    found = corrected(search={"score": "cosine"})
    assert found is not None
    cosines = {judged.blocks: judged.whole.cosine for judged in found.judged}
    worth = min(cosines.values()) < (1 - WORTH) * cosines[solution.blocks]
    assert cosines[found.ranked[0].blocks] == (min(cosines.values()) if worth else cosines[solution.blocks])
    assert found.judged[1].predicted == pytest.approx(pico_scores.total(found.judged[1].blocks, "cosine"))


def test_json_keeps_everything(corrected: Corrected) -> None:
    found = corrected()
    assert found is not None
    finalist = puzzle.correct.finalists.Finalist(blocks=("a",), tokens=1, validation_kl=0.5)
    full = replace(found, finalists=(finalist,))
    assert Correction.from_json(full.to_json()) == full


def test_the_settings_on_the_page_are_settings() -> None:
    (snippet,) = re.findall(r"```yaml\n(.*?)```", Path("docs/correction.md").read_text(encoding="utf-8"), re.DOTALL)
    assert CorrectSettings(**yaml.safe_load(snippet)["correct"]) == CorrectSettings()
