"""Scoring in a run folder of its own, with settings of its own, of the library that is there."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from puzzle.artefacts import ScoreTable
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.recipe import Recipe
from puzzle.runs import Run, create_folder, open_run
from puzzle.scores import score
from puzzle.variants import LayerSpace, Space
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.none import NoAttention, NoFFN

Scorer = Callable[..., ScoreTable]


@pytest.fixture
def small_space(pico_space: Space) -> Space:
    """Six blocks a layer, and a layer without a choice."""
    some = LayerSpace((GroupedQuery(4), GroupedQuery(1), NoAttention()), (GatedFFN(64), NoFFN()))
    only = LayerSpace((GroupedQuery(4),), (GatedFFN(64),))
    assert len(pico_space.layers) == 4
    return Space((some, some, some, only))


@pytest.fixture
def open_folder(tmp_path: Path, pico_recipe: Recipe) -> Iterator[Callable[..., Run]]:
    """Opens the run folder `name`, once, with these settings of `score` and of `execution`."""
    runs: dict[str, Run] = {}
    with ExitStack() as stack:

        def opened(name: str, execution: dict[str, Any] | None = None, **settings: Any) -> Run:
            if name in runs:
                return runs[name]
            values = pico_recipe.model_dump(mode="json", exclude_unset=True)
            values["score"] = values["score"] | settings
            values["execution"] = execution or {}
            create_folder(tmp_path / name, Recipe.model_validate(values))
            runs[name] = stack.enter_context(open_run(tmp_path / name))
            return runs[name]

        yield opened


@pytest.fixture
def scored(
    open_folder: Callable[..., Run],
    pico_parent: Parent,
    pico_data: TokenData,
    pico_library: Library,
    small_space: Space,
) -> Scorer:
    """Scores with these settings; `function` is the task given from Python."""

    def score_table(
        name: str = "run", *, function: Any = None, space: Space = small_space, **settings: Any
    ) -> ScoreTable:
        run = open_folder(name, **settings)
        return score(run, pico_parent, pico_data, pico_library, space, function)

    return score_table
