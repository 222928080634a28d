"""Measured speed of whole models on the engine, beside what the cost table predicted."""

from collections.abc import Mapping

from puzzle.artefacts import Cost, CostTable, Totals
from puzzle.child import Child
from puzzle.costs import Times, time_checkpoints
from puzzle.parents import Parent
from puzzle.runs import Run


def measure_speed(
    run: Run, models: Mapping[str, Parent | Child], costs: CostTable, batch_size: int
) -> dict[str, dict[str, float]]:
    """Prefill, decode and throughput of every model, measured in turns in one go, by the names of `Totals.as_dict`."""
    names = sorted(models)
    settings = {
        "scenario": str(costs.scenario),
        "environment": costs.environment,
        "repeats": run.recipe.cost.repeats,
        "batch_size": batch_size,
        "models": names,
    }
    stage = run.stage("speed", version=2, settings=settings, inputs=[models[name].address for name in names])
    if not stage.done:
        (config,) = (model.config for model in models.values() if isinstance(model, Parent))
        checkpoints = {name: models[name].path for name in names}
        times = time_checkpoints(config, checkpoints, costs.scenario, batch_size, run.recipe.cost.repeats)
        stage.commit(rows={name: _row(times[name], costs, batch_size) for name in names})
    rows: dict[str, dict[str, float]] = stage.facts["rows"]
    return rows


def _row(times: Times, costs: CostTable, batch_size: int) -> dict[str, float]:
    cost = Cost(prefill_ms=times.prefill_ms, decode_ms=times.decode_ms)
    totals = Totals(batch_size=batch_size, generated_tokens=costs.scenario.generated_tokens, cost=cost)
    return {
        "prefill_ms": totals.cost.prefill_ms,
        "decode_ms": totals.cost.decode_ms,
        "request_ms": totals.request_ms,
        "throughput_tok_s": totals.throughput_tok_s,
        "prefill_ms_spread": times.prefill_ms_spread,
        "decode_ms_spread": times.decode_ms_spread,
    }
