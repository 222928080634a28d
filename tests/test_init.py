"""What `puzzle init` chooses from a config.json."""

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from puzzle.init import init_recipe
from puzzle.recipe import Recipe

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
