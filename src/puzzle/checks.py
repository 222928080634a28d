"""What a late stage would refuse, refused before the first one begins."""

from puzzle.engines.environments import MODULES, python_of
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Recipe
from puzzle.search import check_asked, check_spans


def check_recipe(recipe: Recipe, config: PuzzleConfig, *, searched: bool = True) -> None:
    """That nothing in the recipe contradicts the parent, or itself.

    Args:
        searched: whether the search is to be reached, and what comes after it.

    Raises:
        PuzzleError: something does; names the setting.
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


def check_installed(recipe: Recipe, *, timed: bool = True) -> None:
    """That this machine has what the recipe asks for.

    Args:
        timed: whether anything is measured, for which the engines are needed.

    Raises:
        PuzzleError: it has not; names the setting, or says how to install the engine.
    """
    for _, scenario, _ in recipe.served:
        if timed and scenario.engine in MODULES:
            python_of(scenario.engine)
