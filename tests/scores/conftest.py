"""Scoring in a run folder of its own, with settings of its own, of the library that is there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puzzle.artefacts import ScoreTable
from puzzle.data import TokenData
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores import score
from puzzle.variants import LayerSpace, Space, parse_variant

Scorer = Callable[..., ScoreTable]


@pytest.fixture
def scored(tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_library: Library) -> Scorer:
    """Scores in the run folder `name` with these settings; `function` is the task given from Python.

    Six blocks a layer, and a layer without a choice.
    """
    attention = tuple(parse_variant("attention", name) for name in ("kv4", "kv1", "none"))
    ffn = tuple(parse_variant("ffn", name) for name in ("w64", "none"))
    space = Space((LayerSpace(attention, ffn),) * 3 + (LayerSpace(attention[:1], ffn[:1]),))

    def score_table(
        name: str = "run",
        *,
        function: Any = None,
        memory: int | None = None,
        precision: str = "float32",
        **settings: Any,
    ) -> ScoreTable:
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = pico_run.recipe
        sections = {
            "score": recipe.score.model_copy(update=settings),
            "execution": recipe.execution.model_copy(update={"memory": memory}),
            "precision": precision,
        }
        run = Run(tmp_path / name, recipe.model_copy(update=sections))
        return score(run, pico_parent, pico_data, pico_library, space, function)

    return score_table
