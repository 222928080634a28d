"""The recipes that come with the project: valid, complete, and fitting the models they are for."""

from pathlib import Path

import pytest

from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Recipe
from puzzle.variants import derive_space

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

# Sizes from the models' config.json.
PARENTS = {
    "meta-llama/Llama-3.3-70B-Instruct": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "meta-llama/Llama-3.1-405B": {
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "unsloth/Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_its_parent(file: Path) -> None:
    recipe = Recipe.read(file)
    config = PuzzleConfig(**PARENTS[recipe.parent])
    scenario = recipe.scenario
    assert scenario.prompt_tokens + scenario.generated_tokens <= config.max_position_embeddings
    assert recipe.data.sequence_length <= config.max_position_embeddings
    space = recipe.space
    layer = derive_space(
        config, kv_heads=space.kv_heads, ffn_widths=space.ffn_widths, attention=space.attention, ffn=space.ffn
    ).layers[0]
    names = {variant.name for variant in (*layer.attention, *layer.ffn)}
    assert recipe.space.kv_heads is not None
    assert recipe.space.ffn_widths is not None
    wanted = {f"kv{n}" for n in recipe.space.kv_heads} | {f"w{n}" for n in recipe.space.ffn_widths}
    wanted |= {*space.attention, *space.ffn}
    assert wanted <= names, "a variant that no layer can take"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_stage_gets_at_least_one_sequence(file: Path) -> None:
    recipe = Recipe.read(file)
    for section in ("calibration", "library", "score", "distil", "evaluate"):
        assert getattr(recipe, section).tokens >= recipe.data.sequence_length
    assert recipe.library.validation_tokens >= recipe.data.sequence_length


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_shares_hold_the_tokens_that_the_stages_ask_for(file: Path) -> None:
    recipe = Recipe.read(file)
    assert recipe.data.max_tokens is not None
    asked = {
        "calibration": recipe.calibration.tokens,
        "validation": recipe.library.validation_tokens,
        "scoring": recipe.score.tokens,
        "test": recipe.evaluate.tokens,
    }
    for share, tokens in asked.items():
        assert tokens <= recipe.data.max_tokens * getattr(recipe.data, share), share
    assert any(getattr(recipe.target, name) is not None for name in type(recipe.target).model_fields)
