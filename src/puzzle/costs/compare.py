"""Whole models timed on the engine: architectures with random weights, before any of them exists, and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from puzzle.artefacts import CostTable, Scenario
from puzzle.costs.engine import Engine, Sample, Times, doubt, summarise
from puzzle.costs.stage import ENGINES
from puzzle.modeling import PuzzleConfig
from puzzle.runs import progress
from puzzle.variants import Architecture

_DOUBT = 0.02
"""Models are measured again while the ratio of their request times is in more doubt than this."""
_MOST = 4
"""Times the rounds asked for; what doubt is left on a machine on which others work as well is for the caller to ask."""


def time_architectures(
    config: PuzzleConfig, models: Sequence[tuple[Architecture, int]], costs: CostTable, repeats: int
) -> list[Times]:
    """Times of children of the model `config` describes, in the scenario of `costs`, measured in turns.

    Args:
        models: architectures, each with its batch size.
    """
    return [summarise(rounds) for rounds in sample_architectures(config, models, costs, repeats, most=1)]


def sample_architectures(
    config: PuzzleConfig,
    models: Sequence[tuple[Architecture, int]],
    costs: CostTable,
    repeats: int,
    most: int = _MOST,
) -> list[list[Sample]]:
    """The same, round by round.

    Args:
        repeats: rounds; up to `most` times as many where times scatter.
    """
    engine = ENGINES[costs.scenario.engine](config, costs.scenario)
    calls = [partial(engine.measure, architecture.blocks, batch_size) for architecture, batch_size in models]
    return _in_turns(engine, calls, costs.scenario, repeats, most, "time architectures")


def time_checkpoints(
    config: PuzzleConfig, checkpoints: Mapping[str, Path], scenario: Scenario, batch_size: int, repeats: int
) -> dict[str, Times]:
    """Times of whole models on disk, measured in turns, in the way in which the cost table was measured.

    Args:
        config: of the largest of them.
        repeats: rounds; up to `_MOST` times as many where times scatter.
    """
    engine = ENGINES[scenario.engine](config, scenario)
    calls = [partial(engine.measure_checkpoint, checkpoint, batch_size) for checkpoint in checkpoints.values()]
    measured = _in_turns(engine, calls, scenario, repeats, _MOST, "time models")
    return {name: summarise(rounds) for name, rounds in zip(checkpoints, measured, strict=True)}


def _in_turns(
    engine: Engine, calls: Sequence[Callable[[], Sample]], scenario: Scenario, repeats: int, most: int, label: str
) -> list[list[Sample]]:
    samples: list[list[Sample]] = [[] for _ in calls]
    with engine.conditions():
        for _ in range(most):
            again = " again, for they scatter" if samples[0] else ""
            with progress(f"{label}{again}", repeats * len(calls)) as bar:
                for _ in range(repeats):
                    for rounds, call in zip(samples, calls, strict=True):
                        rounds.append(call())
                        bar.advance()
            if _ratios_doubt(samples, scenario) <= _DOUBT:
                break
    return samples


def _ratios_doubt(samples: Sequence[Sequence[Sample]], scenario: Scenario) -> float:
    """The largest, of the models' request times over the first one's in the same round."""
    steps = scenario.generated_tokens - 1
    first, *others = ([each.prefill_ms + steps * each.decode_ms for each in rounds] for rounds in samples)
    ratios = ([own / one for own, one in zip(times_ms, first, strict=True)] for times_ms in others)
    return max((doubt(each) for each in ratios), default=doubt(first))
