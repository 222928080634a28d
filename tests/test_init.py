"""What `puzzle init` chooses from a config.json."""

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from puzzle.data.read import open_sources
from puzzle.errors import PuzzleError
from puzzle.init import init_recipe
from puzzle.parents import read_config
from puzzle.recipe import Recipe
from puzzle.variants import derive_space

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}


@pytest.mark.parametrize("sizes", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_precision_is_left_to_the_machine(tmp_path: Path, sizes: dict[str, int], dtype: str) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype=dtype, **sizes).save_pretrained(tmp_path)
    text = init_recipe(str(tmp_path))
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert (recipe.precision, recipe.scenario.dtype) == ("auto", "auto")
    assert f"M parameters, {dtype}." in text
    assert "`precision: float32` says otherwise" in text


def test_the_text_is_filled_in_or_asked_for(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], **SMALL).save_pretrained(tmp_path / "model")
    recipe = Recipe.model_validate(yaml.safe_load(init_recipe(str(tmp_path / "model"), "mine.jsonl")))
    assert recipe.data.source == ["mine.jsonl"]
    recipe = Recipe.model_validate(yaml.safe_load(init_recipe(str(tmp_path / "model"))))
    with pytest.raises(PuzzleError, match=r"data.source: path/to/your/text is still the example's; name your files"):
        open_sources(recipe.data, tmp_path / "known.json")


def test_quick_is_types_alone(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], **SMALL).save_pretrained(tmp_path)
    text = init_recipe(str(tmp_path), "text.jsonl", quick=True)
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert recipe.library.tokens == recipe.distil.tokens == recipe.correct.tokens == 0
    assert recipe.scenario.engine == "llama.cpp"
    space = derive_space(read_config(recipe.parent), **recipe.space.model_dump(exclude={"outer", "importance"}))
    assert {each.untyped.name for each in space.variants} == {"kv32", "w128"}
    assert "learning_rate" not in text
