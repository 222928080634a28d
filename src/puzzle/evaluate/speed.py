"""Measured speed of whole models on the engine, beside what the cost table predicted."""

from collections.abc import Mapping

from puzzle.artefacts import Cost, CostTable, Totals
from puzzle.child import Child
from puzzle.costs import Sample, summarise, time_models
from puzzle.parents import Parent
from puzzle.runs import Run
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
        times = {architecture: summarise(samples) for architecture, samples in zip(timed, measured, strict=True)}
        rows = {name: _row(times[blocks], costs, batch_size) for name, blocks in architectures.items()}
        stage.commit(rows=rows)
    facts: dict[str, dict[str, float]] = stage.facts["rows"]
    return facts


def _row(times: Sample, costs: CostTable, batch_size: int) -> dict[str, float]:
    cost = Cost(prefill_ms=times.prefill_ms, decode_ms=times.decode_ms)
    totals = Totals(batch_size=batch_size, generated_tokens=costs.scenario.generated_tokens, cost=cost)
    return {
        "prefill_ms": times.prefill_ms,
        "decode_ms": times.decode_ms,
        "request_ms": totals.request_ms,
        "throughput_tok_s": totals.throughput_tok_s,
    }
