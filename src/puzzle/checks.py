"""What a late stage would refuse, refused before the first one begins."""

import torch

from puzzle.device import fast_dtype, is_gpu
from puzzle.engines.environments import MODULES, python_of
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Recipe
from puzzle.search import check_asked, check_spans


def slow_precision(recipe: Recipe, device: torch.device) -> str | None:
    """What `precision: float32` costs on a GPU, if the recipe asks for it."""
    if recipe.precision != "float32" or not is_gpu(device) or fast_dtype(device) == "float32":
        return None
    return (
        "precision: float32 takes twice the memory of bfloat16, and its products 15 times as long on an H100 or H200, "
        "16 on an A100, 4 on an L40S, 2 on an RTX 4090 (data sheets); leave it out for bfloat16"
    )


def check_recipe(recipe: Recipe, config: PuzzleConfig, *, searched: bool = True, timed: bool = False) -> None:
    """Refuse a recipe that contradicts the parent, itself, or what is installed here.

    Args:
        searched: whether the search is to be reached. timed: whether engines are to measure something.
    """
    longest = config.max_position_embeddings
    if recipe.data.sequence_length > longest:
        raise PuzzleError(
            f"data.sequence_length: found {recipe.data.sequence_length}; the parent reads at most {longest} tokens"
        )
    for path, scenario, _ in recipe.served:
        if (tokens := scenario.prompt_tokens + scenario.generated_tokens) > longest:
            raise PuzzleError(
                f"{path}scenario: found {tokens} prompt_tokens and generated_tokens together; the parent reads at most "
                f"{longest} tokens"
            )
    if recipe.search.score == "task" and recipe.score.task is None:
        raise PuzzleError("search.score: found task, and score.task is not set; give its function as `module:function`")
    check_spans(recipe.search, config.num_layers)
    if searched:
        check_asked([target for *_, target in recipe.served], recipe.search)
    for engine in {scenario.engine for _, scenario, _ in recipe.served if timed} & MODULES.keys():
        python_of(engine)
