"""What `puzzle init` chooses from a config.json."""

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from puzzle.init import init_recipe
from puzzle.recipe import Recipe

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}


@pytest.mark.parametrize(
    ("sizes", "dtype", "precision", "served"),
    [
        (LARGE, "float16", "bfloat16", "float16"),  # trained in bfloat16, whose range is that of float32
        (LARGE, "bfloat16", "bfloat16", "bfloat16"),
        (LARGE, "float32", "float32", "float32"),
        (SMALL, "float16", "float32", "float32"),
    ],
)
def test_precision_follows_the_checkpoint(
    tmp_path: Path, sizes: dict[str, int], dtype: str, precision: str, served: str
) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype=dtype, **sizes).save_pretrained(tmp_path)
    recipe = Recipe.model_validate(yaml.safe_load(init_recipe(str(tmp_path))))
    assert (recipe.precision, recipe.scenario.dtype) == (precision, served)
