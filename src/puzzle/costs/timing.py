"""Models timed in turns until their times are known well enough, and the statistics of repeated times."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample
from puzzle.costs.process_engines import LlamaCppEngine, VLLMEngine
from puzzle.costs.roofline import RooflineEngine
from puzzle.costs.torch_engine import TorchEngine
from puzzle.runs import progress

ENGINES: dict[str, Callable[[Scenario], Engine]] = {
    "torch": TorchEngine,
    "vllm": VLLMEngine,
    "llama.cpp": LlamaCppEngine,
    "roofline": RooflineEngine,
}
MOST = 4
"""Times as many rounds as asked for are measured at most."""
Task = tuple[str, int]
"""A model's name and a batch size."""
Samples = dict[Task, list[Sample]]


def time_models(
    models: Sequence[tuple[Model, int]],
    scenario: Scenario,
    rounds: int,
    enough: Callable[[list[list[Sample]]], bool] | None = None,
) -> list[list[Sample]]:
    """Samples of whole models at a batch size each, measured in turns: what slows the machine slows all of them.

    One a round, up to `MOST` times as many as asked for until they are `enough`: by default, until their
    `ratio_standard_error` is at most 1.5 %.
    """
    named = {str(index): model for index, (model, _) in enumerate(models)}
    samples: Samples = {(str(index), batch_size): [] for index, (_, batch_size) in enumerate(models)}
    sure = enough or (lambda measured: ratio_standard_error(measured, scenario) <= 0.015)
    engine = ENGINES[scenario.engine](scenario)
    with engine.conditions():
        measure_in_turns(engine, named, samples, rounds, lambda: sure(list(samples.values())), "time models")
    return list(samples.values())


def measure_in_turns(
    engine: Engine,
    models: Mapping[str, Model],
    samples: Samples,
    rounds: int,
    enough: Callable[[], bool],
    label: str,
    keep: Callable[[Task], None] = lambda task: None,
) -> None:
    """Add to `samples`, those with the fewest first, until all have `rounds`, then until `enough` or `MOST` times that.

    Inside the engine's conditions; `keep` is called with every task that has new samples.
    """
    while (done := min(map(len, samples.values()))) < rounds or (done < MOST * rounds and not enough()):
        tasks = [task for task, each in samples.items() if len(each) == done]
        with progress(f"{label}, round {done + 1}", len(tasks)) as bar:
            for name in dict.fromkeys(name for name, _ in tasks):
                batch_sizes = [batch_size for each, batch_size in tasks if each == name]
                measured = engine.measure(models[name], batch_sizes, rounds if engine.slow_start else 1)
                for batch_size, new in zip(batch_sizes, measured, strict=True):
                    samples[name, batch_size] += new
                    keep((name, batch_size))
                bar.advance(len(batch_sizes))


def requests_ms(samples: Iterable[Sample], scenario: Scenario) -> list[float]:
    """The time of a whole request in each round."""
    return [sample.request_ms(scenario.generated_tokens) for sample in samples]


def ratio_standard_error(samples: Iterable[Sequence[Sample]], scenario: Scenario) -> float:
    """The largest relative standard error of the models' request times over the first one's in the same round."""
    first, *others = (requests_ms(rounds, scenario) for rounds in samples)
    ratios = ([own / one for own, one in zip(times_ms, first, strict=True)] for times_ms in others)
    return max(map(relative_standard_error, ratios), default=relative_standard_error(first))


def summarise(samples: Iterable[Sample]) -> Sample:
    """The typical times of one model from its samples, one a round."""
    return Sample(*map(typical, zip(*samples, strict=True)))


def typical(values: Sequence[float]) -> float:
    """The lower quartile: other programs only ever add time, and the minimum is what a server hardly ever sees.

    It predicted whole models best together with the minimum (docs/numbers.md).
    """
    return float(np.quantile(values, 0.25))


def relative_standard_error(values: Sequence[float]) -> float:
    """One standard error of the lower quartile, as a share of it; 0 of a single value, which does not tell.

    For n normally distributed values it is 1.36 standard deviations / sqrt(n), and half the distance between their
    quartiles 0.67 of one; the factor 1 + 0.8 / n corrects both for small n (simulated; within 7 % from n = 3 on).
    """
    (lower, upper), count = np.quantile(values, [0.25, 0.75]), len(values)
    relative = (1.36 / 0.67) * (1 + 0.8 / count) / math.sqrt(count)
    return float(relative * (upper - lower) / 2 / abs(lower)) if lower else 0.0


def without_drift(times_ms: Sequence[Sequence[float]]) -> list[list[float]]:
    """Times of models that took turns, [models, rounds], as if all rounds had been equally slow: typically so.

    What slows the machine for a while slows all models: by the median over them of their times relative to their own
    medians. So three rounds predict the ratio of two models better than five did as they are (docs/numbers.md). Rounds
    that not all models have are left out.
    """
    rounds = min(map(len, times_ms))
    times_MR = np.array([each[:rounds] for each in times_ms])
    slowdown_R = np.median(times_MR / np.median(times_MR, axis=1, keepdims=True), axis=0)
    corrected: list[list[float]] = (times_MR / slowdown_R * typical(slowdown_R)).tolist()
    return corrected
