"""A model beside its parent: quality on test text, and speed on the engine (docs/numbers.md)."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from puzzle.artefacts import CostTable, Scenario
from puzzle.child import Child
from puzzle.costs import Sample, relative_standard_error, requests_ms, scenario_of, summarise, time_models
from puzzle.data import TokenData
from puzzle.device import choose_device, fast_dtype
from puzzle.errors import PuzzleError
from puzzle.metrics import compare
from puzzle.parents import Parent, open_parent
from puzzle.quantities import QUANTITIES
from puzzle.recipe import ScenarioSettings, parse_overrides, validate
from puzzle.runs import Run, is_run_folder, progress
from puzzle.stages import EVALUATE, SPEED
from puzzle.streams import Stream
from puzzle.units import format_ratio

_BATCH_SIZE = 8
_QUALITIES = {"test_loss": "lm_loss", "top1": "top1", "kl": "kl", "top1_agreement": "top1_agreement"}
"""By their names in the result table, those in `TokenMetrics`, which says what they are."""


@torch.no_grad()
def evaluate(run: Run, parent: Parent, child: Child | None, data: TokenData, label: str) -> dict[str, float]:
    """Means over the test text of `child`, or of the parent itself where that is None: `test_loss`, `top1`, `kl`,
    `top1_agreement`. Neither needs to fit in memory, and each has its own head: after GKD they differ.
    """
    stage = run.open(EVALUATE, parent=parent, model=child or parent, data=data)
    if stage.done:
        return dict(stage.facts)
    sources = [parent] if child is None else [parent, child.source()]
    other_bytes = getattr(torch, run.recipe.precision).itemsize * parent.num_params * (len(sources) - 1)
    streams = [Stream(run, each, stage.path / f"activations{place}", other_bytes) for place, each in enumerate(sources)]
    tokens = data.num_sequences("test", run.recipe.evaluate.tokens) * data.sequence_length
    inputs = partial(data.inputs, "test", _BATCH_SIZE, tokens)
    sums = torch.zeros(len(_QUALITIES), dtype=torch.float64, device=run.device)
    finals = zip(*(stream.finals("test", inputs) for stream in streams), strict=True)
    with progress(f"evaluate the {label}", tokens) as bar:
        for sequences, states_BTD in zip(data.batches("test", _BATCH_SIZE, tokens), finals, strict=True):
            parent_ND, model_ND = states_BTD[0].flatten(0, 1), states_BTD[-1].flatten(0, 1)
            targets_N = sequences[:, 1:].flatten().to(run.device)
            metrics = compare(streams[0].model, streams[-1].model, parent_ND, model_ND.unsqueeze(0), targets_N)
            sums += torch.stack([getattr(metrics, name).double().sum() for name in _QUALITIES.values()])
            bar.advance(len(targets_N))
    for stream in streams:
        stream.close()
    means = dict(zip(_QUALITIES, (sums / tokens).tolist(), strict=True))
    if not all(map(math.isfinite, means.values())):
        raise PuzzleError(f"evaluate: the {label} is not finite on test text ({means}); lower distil.learning_rate")
    stage.commit(**means)
    return means


def measure_speed(
    run: Run, models: Mapping[str, tuple[Parent | Child, int]], costs: CostTable
) -> dict[str, dict[str, float]]:
    """Prefill, decode and throughput of every model at its batch size, measured in turns in one go, by the names of
    `Totals.as_dict`.

    Models of the same blocks are timed once: weights do not change the time.
    """
    served = {name: (model.architecture, batch_size) for name, (model, batch_size) in models.items()}
    timed = {each: name for name, each in served.items()}
    stage = run.open(
        SPEED,
        scenario=str(costs.scenario),
        environment=costs.environment,
        models={name: [models[name][0].address, models[name][1]] for name in sorted(models)},
    )
    if not stage.done:
        tasks = [(models[name][0].path, models[name][1]) for name in timed.values()]
        measured = time_models(tasks, costs.scenario, run.recipe.cost.repeats)
        rows = {each: _row(samples, costs.scenario, each[1]) for each, samples in zip(timed, measured, strict=True)}
        stage.commit(rows={name: rows[each] for name, each in served.items()})
    return dict(stage.facts["rows"])


def bench(checkpoints: Sequence[Path], assignments: Sequence[str]) -> Iterator[str]:
    """How fast checkpoints are in a scenario of these settings (`engine=vllm`), a line for each and batch size."""
    given = parse_overrides(list(assignments), example="engine=vllm")
    settings = validate(ScenarioSettings, {key.removeprefix("scenario."): given[key] for key in given}, "scenario")
    if runs := [path for path in checkpoints if is_run_folder(path)]:
        raise PuzzleError(f"{runs[0]} is a run folder; give its child, {runs[0] / 'child'}")
    device = choose_device("auto")
    scenario = scenario_of(settings.resolved(fast_dtype(device)), device)
    models = {path: open_parent(str(path)).path for path in checkpoints}
    yield str(scenario)
    for batch_size in settings.batch_sizes:
        measured = time_models([(path, batch_size) for path in models.values()], scenario, rounds=3)
        first_ms = requests_ms(measured[0], scenario)
        for name, samples in zip(models, measured, strict=True):
            row, its_ms = _row(samples, scenario, batch_size), requests_ms(samples, scenario)
            line = f"{name}, batch {batch_size}: {QUANTITIES['throughput_tok_s'].text(row['throughput_tok_s'])} "
            line += f"(+- {relative_standard_error(its_ms):.1%}, {len(samples)} rounds), "
            line += f"prefill {row['prefill_ms']:.4g} ms, decode step {row['decode_ms']:.4g} ms"
            if samples is not measured[0]:
                # Round by round: what slows the machine slows all of them.
                ratios = [first / its for first, its in zip(first_ms, its_ms, strict=True)]
                line += f"; {format_ratio(statistics.median(ratios))} the first's throughput "
                line += f"(+- {relative_standard_error(ratios):.1%})"
            yield line


def _row(samples: Sequence[Sample], scenario: Scenario, batch_size: int) -> dict[str, float]:
    typical = summarise(samples)
    request_ms = typical.request_ms(scenario.generated_tokens)
    throughput = QUANTITIES["throughput_tok_s"].convert(request_ms, batch_size, scenario.generated_tokens)
    return typical._asdict() | {"request_ms": request_ms, "throughput_tok_s": throughput}
