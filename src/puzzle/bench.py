"""`puzzle bench`: any checkpoint timed in the way in which every figure here was measured, so that anyone can check."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from puzzle.artefacts import Cost, Scenario, Totals
from puzzle.costs import Sample, relative_standard_error, scenario_of, summarise, time_models
from puzzle.device import choose_device
from puzzle.errors import PuzzleError
from puzzle.parents import open_parent
from puzzle.recipe import ScenarioSettings, parse_overrides, validate
from puzzle.runs import is_run_folder

_ROUNDS = 3


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
    scenario = scenario_of(settings, choose_device("auto"))
    models = {path: open_parent(str(path)).path for path in checkpoints}
    yield str(scenario)
    for batch_size in settings.batch_sizes:
        measured = time_models([(path, batch_size) for path in models.values()], scenario, _ROUNDS)
        for name, samples in zip(models, measured, strict=True):
            yield f"{name}, batch {batch_size}: {_line(scenario, batch_size, samples)}"


def _line(scenario: Scenario, batch_size: int, samples: Sequence[Sample]) -> str:
    times, generated = summarise(samples), scenario.generated_tokens
    cost = Cost(prefill_ms=times.prefill_ms, decode_ms=times.decode_ms)
    totals = Totals(batch_size=batch_size, generated_tokens=generated, cost=cost)
    error = relative_standard_error([sample.request_ms(generated) for sample in samples])
    return (
        f"{totals.throughput_tok_s:,.0f} generated tok/s (+- {error:.1%}, {len(samples)} rounds), "
        f"prefill {times.prefill_ms:.4g} ms, decode step {times.decode_ms:.4g} ms"
    )
