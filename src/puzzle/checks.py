"""What a late stage would refuse, refused before the first one begins."""

import torch

from puzzle.artefacts import Totals
from puzzle.costs import COPIES, parent_totals
from puzzle.device import choose_device, fast_dtype, is_gpu, memory_bytes
from puzzle.engines.environments import MODULES, python_of
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, empty_model, plain_tensors
from puzzle.quantities import SETTINGS, Quantity
from puzzle.recipe import Recipe, ScenarioSettings, TargetSettings
from puzzle.search import check_asked, check_spans
from puzzle.units import Amount, format_bytes


def slow_precision(recipe: Recipe, device: torch.device) -> str | None:
    """What `precision: float32` costs on a GPU, if the recipe asks for it."""
    if recipe.precision != "float32" or not is_gpu(device) or fast_dtype(device) == "float32":
        return None
    return (
        "precision: float32 takes twice the memory of bfloat16, and its products 15 times as long on an H100 or H200, "
        "16 on an A100, 4 on an L40S, 2 on an RTX 4090 (data sheets); leave it out for bfloat16"
    )


def check_recipe(
    recipe: Recipe, config: PuzzleConfig, *, searched: bool = True, timed: bool = False, here: bool = False
) -> None:
    """Refuse a recipe that contradicts the parent, itself, or what is installed here.

    Args:
        searched: whether the search is to be reached. timed: whether engines are to measure something.
        here: whether they would do so on this machine.
    """
    longest, length = config.max_position_embeddings, recipe.data.sequence_length
    most = f"the parent reads at most {longest} tokens"
    if length > longest:
        raise PuzzleError(f"data.sequence_length: found {length}; {most}")
    for path, scenario, _ in recipe.served:
        if (tokens := scenario.prompt_tokens + scenario.generated_tokens) > longest:
            raise PuzzleError(f"{path}scenario: found {tokens} prompt_tokens and generated_tokens together; {most}")
    if recipe.space.types or recipe.space.outer:
        if others := {scenario.engine for _, scenario, _ in recipe.served} - {"llama.cpp"}:
            found = f"found engine {min(others)}, which has none"
            raise PuzzleError(f"space.types: {found}; set scenario.engine: llama.cpp")
        if recipe.library.coupled:
            raise PuzzleError("library.coupled: found with space.types, whose twins are of subblocks; leave one out")
        if any(plain.factor != 1 for plain in plain_tensors(empty_model(config)).values()):
            family = config.base_model_type
            raise PuzzleError(f"space.types: {family} has factors, which a GGUF file has in its matrices; leave it out")
    if recipe.search.score == "task" and recipe.score.task is None:
        raise PuzzleError("search.score: found task, and score.task is not set; give its function as `module:function`")
    check_spans(recipe.search, config.num_layers)
    if searched:
        check_asked([target for *_, target in recipe.served], recipe.search)
        free = not (recipe.search.fix or recipe.search.forbid or recipe.search.equal)
        if recipe.search.objective == "score" and free and all(_met(config, *each[1:]) for each in recipe.served):
            bounds = ", ".join(f"{name} {bound.text}" for name, bound in recipe.target if bound is not None)
            more = "ask for more, such as `throughput: 2x`, `memory: 70%`"
            raise PuzzleError(f"target: the parent itself meets it ({bounds}); {more}")
    for path, scenario, _ in recipe.served if here else ():
        totals = parent_totals(config, scenario, max(scenario.batch_sizes))
        cache = totals.batch_size * totals.cost.kv_bytes_per_sequence * (2 + COPIES) / config.num_layers
        memory = memory_bytes(choose_device(recipe.execution.device), recipe.execution.memory)
        if scenario.engine == "torch" and cache > memory:
            found = f"{totals.batch_size}, at which the cache of {2 + COPIES} layers takes {format_bytes(cache)}"
            more = f"lower it or the scenario's tokens; execution.memory is {format_bytes(memory)}"
            raise PuzzleError(f"{path}scenario.batch_sizes: found {found}; {more}")
    for engine in {scenario.engine for _, scenario, _ in recipe.served if timed} & MODULES.keys():
        python_of(engine)


def _met(config: PuzzleConfig, scenario: ScenarioSettings, target: TargetSettings) -> bool:
    """Whether the parent meets the target, as far as that is known before anything is measured."""

    def met(quantity: Quantity, bound: Amount, totals: Totals) -> bool:
        if bound.relative:
            return bound.value <= 1 if quantity.at_least else bound.value >= 1
        return quantity.exact and quantity.value(totals) <= bound.value

    every = [parent_totals(config, scenario, size) for size in scenario.batch_sizes]
    asked = [(SETTINGS[name], bound) for name, bound in target if bound is not None and name != "score"]
    return any(all(met(*each, totals) for each in asked) for totals in every)
