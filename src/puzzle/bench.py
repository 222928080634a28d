"""`puzzle bench`: any checkpoint timed in the way in which every figure here was measured, so that anyone can check."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from puzzle.artefacts import Cost, Scenario, Totals
from puzzle.costs import Times, scenario_of, time_checkpoints
from puzzle.errors import PuzzleError
from puzzle.parents import open_parent
from puzzle.recipe import ScenarioSettings, parse_overrides, validate
from puzzle.runs import is_run_folder

_ROUNDS = 5


def bench(checkpoints: Sequence[Path], assignments: Sequence[str]) -> Iterator[str]:
    """A line for each checkpoint and batch size, measured in turns, and one that says on what.

    Args:
        assignments: settings of the recipe's scenario, such as `engine=vllm`.
    """
    given = parse_overrides(list(assignments), example="engine=vllm")
    given = {key.removeprefix("scenario."): given[key] for key in given}
    settings = validate(ScenarioSettings, given, "scenario")
    for path in checkpoints:
        if is_run_folder(path):
            raise PuzzleError(f"{path} is a run folder; give its child, {path / 'child'}")
    scenario = scenario_of(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    models = {str(path): open_parent(str(path)) for path in checkpoints}
    largest = max(models.values(), key=lambda model: model.num_params)
    yield str(scenario)
    for batch_size in settings.batch_sizes:
        paths = {name: model.path for name, model in models.items()}
        for name, times in time_checkpoints(largest.config, paths, scenario, batch_size, _ROUNDS).items():
            yield f"{name}, batch {batch_size}: {_line(scenario, batch_size, times)}"


def _line(scenario: Scenario, batch_size: int, times: Times) -> str:
    cost = Cost(prefill_ms=times.prefill_ms, decode_ms=times.decode_ms)
    totals = Totals(batch_size=batch_size, generated_tokens=scenario.generated_tokens, cost=cost)
    return (
        f"{totals.throughput_tok_s:,.0f} generated tok/s, prefill {times.prefill_ms:.4g} ms "
        f"(+- {times.prefill_ms_spread:.2g}), decode step {times.decode_ms:.4g} ms (+- {times.decode_ms_spread:.2g})"
    )
