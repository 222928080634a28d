"""Measured speed of whole models on an engine, in turns: a run's models, or any checkpoints (`puzzle bench`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from puzzle.artefacts import CostTable, Scenario
from puzzle.child import Child
from puzzle.costs import Sample, relative_standard_error, scenario_of, summarise, time_models
from puzzle.device import choose_device
from puzzle.errors import PuzzleError
from puzzle.parents import Parent, open_parent
from puzzle.quantities import QUANTITIES
from puzzle.recipe import ScenarioSettings, parse_overrides, validate
from puzzle.runs import Run, is_run_folder
from puzzle.stages import SPEED


def measure_speed(
    run: Run, models: Mapping[str, Parent | Child], costs: CostTable, batch_size: int
) -> dict[str, dict[str, float]]:
    """Prefill, decode and throughput of every model, measured in turns in one go, by the names of `Totals.as_dict`.

    Models of the same blocks are timed once: weights do not change the time (docs/numbers.md).
    """
    architectures = {name: model.architecture for name, model in models.items()}
    timed = {architecture: name for name, architecture in architectures.items()}
    stage = run.open(
        SPEED,
        scenario=str(costs.scenario),
        environment=costs.environment,
        batch_size=batch_size,
        models={name: models[name].address for name in sorted(models)},
    )
    if not stage.done:
        tasks = [(models[name].path, batch_size) for name in timed.values()]
        measured = time_models(tasks, costs.scenario, run.recipe.cost.repeats)
        rows = {blocks: _row(each, costs.scenario, batch_size) for blocks, each in zip(timed, measured, strict=True)}
        stage.commit(rows={name: rows[blocks] for name, blocks in architectures.items()})
    facts: dict[str, dict[str, float]] = stage.facts["rows"]
    return facts


def bench(checkpoints: Sequence[Path], assignments: Sequence[str]) -> Iterator[str]:
    """A line for each checkpoint and batch size, measured as every figure here, and one that says on what.

    Args:
        assignments: settings of the recipe's scenario, such as `engine=vllm`.
    """
    given = parse_overrides(list(assignments), example="engine=vllm")
    settings = validate(ScenarioSettings, {key.removeprefix("scenario."): given[key] for key in given}, "scenario")
    for path in checkpoints:
        if is_run_folder(path):
            raise PuzzleError(f"{path} is a run folder; give its child, {path / 'child'}")
    scenario = scenario_of(settings, choose_device("auto"))
    models = {path: open_parent(str(path)).path for path in checkpoints}
    yield str(scenario)
    for batch_size in settings.batch_sizes:
        measured = time_models([(path, batch_size) for path in models.values()], scenario, rounds=3)
        for name, samples in zip(models, measured, strict=True):
            row = _row(samples, scenario, batch_size)
            error = relative_standard_error([sample.request_ms(scenario.generated_tokens) for sample in samples])
            yield (
                f"{name}, batch {batch_size}: {row['throughput_tok_s']:,.0f} generated tok/s (+- {error:.1%}, "
                f"{len(samples)} rounds), prefill {row['prefill_ms']:.4g} ms, decode step {row['decode_ms']:.4g} ms"
            )


def _row(samples: Sequence[Sample], scenario: Scenario, batch_size: int) -> dict[str, float]:
    times = summarise(samples)
    request_ms = times.request_ms(scenario.generated_tokens)
    throughput = QUANTITIES["throughput_tok_s"].convert(request_ms, batch_size, scenario.generated_tokens)
    return asdict(times) | {"request_ms": request_ms, "throughput_tok_s": throughput}
