"""Architectures timed whole on the engine, with random weights, before any of them exists."""

from collections.abc import Sequence

from puzzle.artefacts import CostTable
from puzzle.blocks import Architecture
from puzzle.costs.engine import Sample, Times, summarise
from puzzle.costs.stage import ENGINES
from puzzle.modeling import PuzzleConfig
from puzzle.runs import progress


def time_architectures(
    config: PuzzleConfig, models: Sequence[tuple[Architecture, int]], costs: CostTable, repeats: int
) -> list[Times]:
    """Times of children of the model `config` describes, in the scenario of `costs`, measured in turns.

    Args:
        models: architectures, each with its batch size.
    """
    engine = ENGINES[costs.scenario.engine](config, costs.scenario)
    samples: list[list[Sample]] = [[] for _ in models]
    with progress("time architectures", repeats * len(models)) as bar, engine.conditions():
        for _ in range(repeats):
            for rounds, (architecture, batch_size) in zip(samples, models, strict=True):
                rounds.append(engine.measure(architecture.blocks, batch_size))
                bar.advance()
    return [summarise(rounds) for rounds in samples]
