"""The recipes that come with the project: valid, complete, and fitting the models they are for."""

from pathlib import Path
from typing import Any

import pytest

from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Recipe
from puzzle.variants import derive_space

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

# Hidden size, FFN width, layers and heads from the models' config.json; all have 8 KV heads and 131,072 positions.
PARENTS = {
    "meta-llama/Llama-3.3-70B-Instruct": (8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-405B": (16384, 53248, 126, 128),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32),
    "unsloth/Llama-3.2-1B": (2048, 8192, 16, 32),
}


def parent_config(name: str, **others: Any) -> PuzzleConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, PARENTS[name], strict=True))
    return PuzzleConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **sizes, **others)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_parent(file: Path) -> None:
    recipe = Recipe.read(file)
    config = parent_config(recipe.parent)
    assert recipe.scenario.prompt_tokens + recipe.scenario.generated_tokens <= 131072
    assert recipe.data.sequence_length <= 131072
    space = recipe.space
    assert space.kv_heads is not None
    assert space.ffn_widths is not None
    layer = derive_space(config, **space.model_dump(exclude={"outer", "importance"})).layers[0]
    wanted = {f"kv{n}" for n in space.kv_heads} | {f"w{n}" for n in space.ffn_widths} | {*space.attention, *space.ffn}
    assert wanted <= {variant.name for variant in (*layer.attention, *layer.ffn)}, "a variant that no layer can take"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_gives_every_stage_its_tokens(file: Path) -> None:
    recipe = Recipe.read(file)
    assert recipe.data.max_tokens is not None
    asked = {
        "calibration": recipe.calibration.tokens,
        "validation": recipe.library.validation_tokens,
        "scoring": recipe.score.tokens,
        "test": recipe.evaluate.tokens,
    }
    for share, tokens in asked.items():
        assert recipe.data.sequence_length <= tokens <= recipe.data.max_tokens * getattr(recipe.data, share), share
    assert min(recipe.library.tokens, recipe.distil.tokens) >= recipe.data.sequence_length
    assert any(value is not None for _, value in recipe.target)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
