"""Whole models timed on the engine: architectures with random weights, before any of them exists, and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from puzzle.artefacts import CostTable, Scenario
from puzzle.blocks import Architecture
from puzzle.costs.engine import Engine, Sample, Times, summarise
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
    calls = [partial(engine.measure, architecture.blocks, batch_size) for architecture, batch_size in models]
    return _in_turns(engine, calls, repeats, "time architectures")


def time_checkpoints(
    config: PuzzleConfig, checkpoints: Mapping[str, Path], scenario: Scenario, batch_size: int, repeats: int
) -> dict[str, Times]:
    """Times of whole models on disk, measured in turns, in the way in which the cost table was measured.

    Args:
        config: of the largest of them.
    """
    engine = ENGINES[scenario.engine](config, scenario)
    calls = [partial(engine.measure_checkpoint, checkpoint, batch_size) for checkpoint in checkpoints.values()]
    return dict(zip(checkpoints, _in_turns(engine, calls, repeats, "time models"), strict=True))


def _in_turns(engine: Engine, calls: Sequence[Callable[[], Sample]], repeats: int, label: str) -> list[Times]:
    samples: list[list[Sample]] = [[] for _ in calls]
    with progress(label, repeats * len(calls)) as bar, engine.conditions():
        for _ in range(repeats):
            for rounds, call in zip(samples, calls, strict=True):
                rounds.append(call())
                bar.advance()
    return [summarise(rounds) for rounds in samples]
