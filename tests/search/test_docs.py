"""Every recipe snippet of the page is a recipe."""

import re
from pathlib import Path

import pytest
import yaml

from puzzle.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "search.md"
SNIPPETS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_is_valid(snippet: str) -> None:
    given = {"parent": "p", "data": {"source": "s"}}
    recipe = Recipe.model_validate(given | yaml.safe_load(snippet))
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
