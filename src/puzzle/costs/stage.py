"""The stage `costs`: every variant of every layer in the recipe's scenario, measured on the engine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.costs.engine import Engine, Sample
from puzzle.costs.kept import KeptMeasurements, kept_folder, model_shapes
from puzzle.costs.slopes import PADS, Plan
from puzzle.costs.table import cost_rows, part_times
from puzzle.costs.timing import (
    ENGINES,
    MOST,
    Samples,
    Task,
    measure_in_turns,
    relative_standard_error,
    typical,
    without_drift,
)
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.recipe import ScenarioSettings
from puzzle.runs import Run, read_parsed, write_text
from puzzle.stages import COST
from puzzle.variants import Architecture, Space

_PRECISION = 0.03
"""All stacks are measured again while the typical relative standard error of their request times is larger."""
_OFF = 0.05
"""Kept measurements are not used where the pads' request time differs by more, and by more than two standard errors."""


def measure_costs(run: Run, parent: Parent, space: Space, settings: ScenarioSettings | None = None) -> CostTable:
    """What every variant of every layer costs in the recipe's scenario: memory from shapes, times from the engine.

    The address holds shapes, scenario and machine but no weights: models of one shape cost the same.

    Args:
        settings: of another scenario.
    """
    run.apply_threads()
    settings = settings or run.recipe.scenario
    scenario = scenario_of(settings, run.device)
    engine = ENGINES[settings.engine](scenario)
    environment = dict(engine.environment)
    stage = run.open(
        COST,
        shapes=model_shapes(parent.config),
        space=[[[v.name for v in layer.attention], [v.name for v in layer.ffn]] for layer in space.layers],
        scenario=[str(scenario), settings.batch_sizes],
        environment=environment,
    )
    file = stage.path / "costs.json"
    if stage.done:
        return read_parsed(file, CostTable.from_json)
    plan, batch_sizes = Plan.of(space, parent.config), tuple(dict.fromkeys(settings.batch_sizes))
    folder = kept_folder(stage.path / "measurements", shared=run.recipe.cost.reuse)
    kept = KeptMeasurements(folder, scenario, environment)
    stacks = {name: Architecture(stack).configure(parent.config) for name, stack in plan.stacks.items()}
    with engine.conditions():
        samples = _Stacks(run, engine, stacks, batch_sizes, kept, scenario.generated_tokens).samples()
    rows: list[CostRow] = []
    for batch_size in batch_sizes:
        times = part_times(plan, {name: samples[name, batch_size] for name in stacks})
        rows += cost_rows(parent.config, space, scenario, batch_size, times)
    table = CostTable(scenario=scenario, batch_sizes=batch_sizes, rows=tuple(rows), environment=environment)
    write_text(file, table.to_json())
    stage.commit(measurements=sum(map(len, samples.values())))
    return table


def scenario_of(settings: ScenarioSettings, device: torch.device) -> Scenario:
    """What is measured, on the device that the engine uses if this one is there."""
    devices = {"roofline": settings.machine, "llama.cpp": "cpu"}
    return Scenario(
        engine=settings.engine,
        device=devices.get(settings.engine, str(device)),
        dtype=settings.dtype,
        prompt_tokens=settings.prompt_tokens,
        generated_tokens=settings.generated_tokens,
    )


@dataclass(frozen=True)
class _Stacks:
    """The stacks of a plan at all batch sizes: kept measurements where there are, the others measured in turns."""

    run: Run
    engine: Engine
    stacks: Mapping[str, PuzzleConfig]
    batch_sizes: Sequence[int]
    kept: KeptMeasurements
    generated_tokens: int

    def samples(self) -> Samples:
        """As many rounds of every stack: `cost.repeats`, up to `MOST` times as many where times scatter."""
        rounds = self.run.recipe.cost.repeats
        samples: Samples = {(name, batch_size): [] for name in self.stacks for batch_size in self.batch_sizes}
        for batch_size in self.batch_sizes:
            self._use_kept(samples, batch_size, rounds)

        def wanted() -> list[Task]:
            least = min(map(len, samples.values()))
            if least >= rounds and (least >= MOST * rounds or self._error(samples) <= _PRECISION):
                return []
            return [task for task, each in samples.items() if len(each) == least]

        def keep(task: Task) -> None:
            name, batch_size = task
            if name != PADS:
                pads_ms = typical(self._requests_ms(samples[PADS, batch_size]))
                self.kept.put(self.stacks[name], batch_size, samples[task], pads_ms)

        measure_in_turns(self.engine, self.stacks, samples, wanted, rounds, "costs", keep)
        if (error := self._error(samples)) > _PRECISION:
            self.run.log_warning(
                f"costs: times scatter, the typical stack's is known to {2 * error:.0%} only; close other programs, "
                "or raise cost.repeats and set cost.reuse: false if predictions are to be exact"
            )
        least = min(map(len, samples.values()))
        return {task: each[:least] for task, each in samples.items()}

    def _use_kept(self, samples: Samples, batch_size: int, rounds: int) -> None:
        """Take kept samples into `samples` if the pads, which are always measured, take as long as they did then."""
        found = {name: self.kept.get(stack, batch_size) for name, stack in self.stacks.items()}
        kept = {name: each for name, each in found.items() if each is not None}
        if not kept:
            return
        pads: Task = (PADS, batch_size)

        def wanted() -> list[Task]:
            return [pads] if len(samples[pads]) < rounds else []

        measure_in_turns(self.engine, self.stacks, samples, wanted, rounds, "costs of the pads")
        pads_ms, error = typical(now := self._requests_ms(samples[pads])), relative_standard_error(now)
        changes = {name: pads_ms / each.pads_ms - 1 for name, each in kept.items()}
        used = [name for name, change in changes.items() if abs(change) <= max(_OFF, 2 * error)]
        for name in used:
            samples[name, batch_size] += kept[name].samples
        dates, load = sorted(each.measured for each in kept.values()), max(each.load for each in kept.values())
        change = max(changes.values(), key=abs)
        self.run.log(
            f"costs at batch {batch_size}: {len(kept)} of {len(self.stacks) - 1} stacks are in {self.kept.folder}, "
            f"measured from {dates[0]} to {dates[-1]} at a load of up to {load:g}; the pads take {change:+.1%} now; "
            f"using {len(used)}, measuring the others"
        )

    def _error(self, samples: Samples) -> float:
        """The typical stack's relative standard error, without what slowed a whole round."""
        least = min(map(len, samples.values()))
        times_ms = [self._requests_ms(each[:least]) for each in samples.values()]
        return statistics.median(map(relative_standard_error, without_drift(times_ms)))

    def _requests_ms(self, samples: Sequence[Sample]) -> list[float]:
        return [sample.request_ms(self.generated_tokens) for sample in samples]
