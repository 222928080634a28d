"""The pool as whole architectures: what takes the place of the search's own, and that it goes on where it stood."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from puzzle.artefacts import Correction, CostTable, ScoreTable, WholeScore
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.recipe import CorrectSettings, Recipe, TargetSettings
from puzzle.runs import Run
from puzzle.scores import true_scores
from puzzle.search import Tables, correct, pool, solve
from puzzle.search.stage import MIN_IMPROVEMENT
from puzzle.search.tables import violations


@pytest.fixture
def tables(pico_scores: ScoreTable, toy_costs: CostTable, pico_run: Run) -> Tables:
    target = TargetSettings.model_validate({"throughput": "1.7x"})
    return Tables(scores=pico_scores, costs=toy_costs, target=target, settings=pico_run.recipe.search)


def whole(blocks: Sequence[str], kl: float) -> WholeScore:
    return WholeScore(blocks=tuple(blocks), kl=kl, kl_se=0.0, lm_loss=kl, top1_agreement=1.0, cosine=kl)


@pytest.mark.parametrize(
    ("values", "ranked"),
    [
        ((1.0, 0.96, 0.98, 0.9), (3, 1, 0)),
        ((1.0, 0.98, 1.2, 1.0), (0,)),
        ((math.inf, 2.0, math.inf, 1.0), (3, 1, 0)),
        ((-1.0, -1.02, -1.05, 0.0), (2, 0)),
    ],
)
def test_another_one_must_be_better_by_enough(
    tables: Tables,
    tmp_path: Path,
    pico_run: Run,
    pico_data: TokenData,
    pico_library: Library,
    values: Sequence[float],
    ranked: Sequence[int],
) -> None:
    settings = CorrectSettings(pool=4, differing=1)
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"correct": settings}))
    solutions = pool(tables, 4, 1)
    found = correct(run, tables, solutions[0], lambda some: [*map(whole, some, values)], pico_library, pico_data)
    assert [each.blocks for each in found.ranked] == [solutions[place].blocks for place in ranked]
    assert [each.kl for each in found.evaluated] == list(values)
    assert Correction.from_json(found.to_json()) == found


def test_it_ends_within_the_bounds_and_goes_on_after_a_kill(
    tables: Tables,
    tmp_path: Path,
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_library: Library,
) -> None:
    settings = CorrectSettings(tokens=256, pool=4, differing=2)
    run = Run(tmp_path, pico_run.recipe.model_copy(update={"correct": settings}))
    solution = solve(tables)

    evaluate = partial(true_scores, run, pico_parent, pico_data, pico_library)

    def evaluate_and_die(some: Sequence[tuple[str, ...]]) -> list[WholeScore]:
        evaluate(some[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        correct(run, tables, solution, evaluate_and_die, pico_library, pico_data)
    found = correct(run, tables, solution, evaluate, pico_library, pico_data)
    values = [each.kl for each in found.evaluated]
    assert len(values) == 4
    assert found.ranked[-1] == solution
    assert found.evaluated[0].blocks == solution.blocks
    best = min(values) if min(values) < (1 - MIN_IMPROVEMENT) * values[0] else values[0]
    assert values[[each.blocks for each in found.evaluated].index(found.ranked[0].blocks)] == best
    for each in found.ranked:
        totals = tables.costs.totals(each.blocks, each.batch_size)
        assert not violations(totals.as_dict(), solution.bounds)
        assert tables.scores.total(each.blocks) == pytest.approx(each.score)
    assert correct(run, tables, solution, lambda some: [], pico_library, pico_data) == found


@pytest.mark.parametrize(
    "settings",
    [{"correct": {"tokens": 0}}, {"search": {"score": "task"}}, {"search": {"objective": "latency"}}, {"target": {}}],
)
def test_nothing_is_compared_where_the_recipe_says_so(settings: dict[str, object]) -> None:
    values = {"parent": "p", "data": {"source": "s"}, "target": {"throughput": "2x"}}
    assert Recipe.model_validate(values).corrected
    assert not Recipe.model_validate(values | settings).corrected


def test_the_settings_on_the_page_are_settings() -> None:
    (snippet,) = re.findall(r"```yaml\n(.*?)```", Path("docs/correction.md").read_text(encoding="utf-8"), re.DOTALL)
    assert CorrectSettings(**yaml.safe_load(snippet)["correct"]) == CorrectSettings()


def test_other_margins_are_other_pools(tables: Tables) -> None:
    wide = replace(tables, settings=tables.settings.model_copy(update={"margin": 0.3}))
    assert pool(wide, 2, 1)[0].bounds != pool(tables, 2, 1)[0].bounds
