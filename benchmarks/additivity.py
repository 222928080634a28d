"""Do costs add up? Random architectures timed whole, against the sums of the cost table, on one engine.

    python benchmarks/additivity.py CHECKPOINT ENGINE [BATCH] [PROMPT] [GENERATED] [ROUNDS] [THREADS]

Stacks and architectures take turns in the same rounds. Every architecture is there twice: how far its two times are
apart is the floor, below which an error says nothing. A last pair of columns is of the table fitted to the first three
models, as a search fits it to what it has timed. Every sample is kept in `results/additivity.jsonl`.
"""

import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from puzzle.artefacts import CostTable
from puzzle.costs import ENGINES, Sample, scenario_of, summarise
from puzzle.costs.table import Stack, cost_rows, stacks_of
from puzzle.costs.timing import Samples, measure_in_turns
from puzzle.engines.capability import TIMED_AS, deployable
from puzzle.parents import open_parent
from puzzle.recipe import ScenarioSettings
from puzzle.search.timing import Timed, fitted
from puzzle.variants import Architecture, BlockVariant, Space, derive_space

ARCHITECTURES, FITTED = 10, 3
QUANTITIES = ("prefill_ms", "decode_ms")
KEPT = Path(__file__).parent / "results" / "additivity.jsonl"


def main(
    checkpoint: str,
    name: str,
    batch: str = "8",
    prompt: str = "256",
    generated: str = "64",
    rounds: str = "9",
    threads: str = "1",
) -> None:
    """Print a line for every architecture, and the means."""
    torch.set_num_threads(int(threads))
    config = open_parent(checkpoint).config
    settings = ScenarioSettings(engine=name, prompt_tokens=int(prompt), generated_tokens=int(generated))
    scenario, size = scenario_of(settings, torch.device("cpu")), int(batch)
    space = deployable(derive_space(config), config, [TIMED_AS[name]] if name in TIMED_AS else [])
    engine = ENGINES[name](scenario)
    models = architectures(space)
    asked = stacks_of(space, config) | models | {f"{model} again": blocks for model, blocks in models.items()}
    configs = {model: Architecture(blocks).configure(config) for model, blocks in asked.items()}
    samples: Samples = {(model, size): [] for model in asked}
    said = f"{Path(checkpoint).name}, {dict(engine.environment)}, {scenario}, batch {batch}, {rounds} rounds"
    print(said, flush=True)
    with engine.conditions():
        measure_in_turns(engine, configs, samples, int(rounds), lambda: True, "time stacks")
    measured = {model: each for (model, _), each in samples.items()}
    with KEPT.open("a") as file:
        kept = [{model: each[index]._asdict() for model, each in measured.items()} for index in range(int(rounds))]
        file.write(json.dumps({"setting": said, "rounds": kept}) + "\n")
    rows = tuple(cost_rows(config, space, scenario, size, measured))
    table = CostTable(scenario=scenario, batch_sizes=(size,), rows=rows)
    times = {model: summarise([*measured[model], *measured[f"{model} again"]]) for model in models}
    known = [each for model in list(models)[:FITTED] for each in _timed(table, models[model], size, times[model])]
    after = fitted(table, size, known)
    lines = {
        model: (
            *_errors(_timed(table, blocks, size, times[model])),
            *_floor(measured[model], measured[f"{model} again"]),
            *_errors(_timed(after, blocks, size, times[model])),
        )
        for model, blocks in models.items()
    }
    print(f"| | {' | '.join(f'{what} {each}' for what in ('error', 'floor', 'fitted') for each in QUANTITIES)} |")
    for model, line in lines.items():
        print(f"| {model} | " + " | ".join(f"{error:+.1%}" for error in line) + " |")
    columns = [[abs(error) for error in column] for column in list(zip(*lines.values(), strict=True))]
    unseen = [column[FITTED:] if index >= 4 else column for index, column in enumerate(columns)]
    print("| mean, without sign | " + " | ".join(f"{statistics.mean(column):.1%}" for column in unseen) + " |")
    print("| worst | " + " | ".join(f"{max(column):.1%}" for column in unseen) + " |")


def architectures(space: Space) -> dict[str, Stack]:
    """The parent, and random ones, always the same."""
    chosen = random.Random(0)
    drawn = {
        f"mixed {index}": tuple(
            BlockVariant(chosen.choice(layer.attention), chosen.choice(layer.ffn)) for layer in space.layers
        )
        for index in range(ARCHITECTURES)
    }
    return {"parent": tuple(layer.parent for layer in space.layers), **drawn}


def _timed(table: CostTable, blocks: Stack, batch_size: int, times: Sample) -> list[Timed]:
    """Prefill and decode step."""
    cost = table.totals([block.name for block in blocks], batch_size).cost
    return [
        Timed(model="child", quantity=name, predicted=getattr(cost, name), measured=getattr(times, name))
        for name in QUANTITIES
    ]


def _errors(times: Sequence[Timed]) -> Iterator[float]:
    """Of a prediction: prefill, decode."""
    return (each.predicted / each.measured - 1 for each in times)


def _floor(first: Sequence[Sample], again: Sequence[Sample]) -> Iterator[float]:
    """How far the same model's two times are apart: prefill, decode."""
    return (getattr(summarise(first), each) / getattr(summarise(again), each) - 1 for each in QUANTITIES)


if __name__ == "__main__":
    main(*sys.argv[1:])
