"""The stage `costs`: every variant of every layer in the recipe's scenario, measured on the engine."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.costs.engine import Engine, Sample, spread, summarise, typical
from puzzle.costs.journal import Journal, Key
from puzzle.costs.kept import KeptMeasurements, model_shapes
from puzzle.costs.llama_cpp_engine import LlamaCppEngine
from puzzle.costs.roofline import RooflineEngine
from puzzle.costs.slopes import PADS, Plan
from puzzle.costs.table import cost_rows, part_times
from puzzle.costs.torch_engine import TorchEngine
from puzzle.costs.vllm_engine import VLLMEngine
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.recipe import ScenarioSettings
from puzzle.runs import Run, digest, progress, read_parsed, write_text
from puzzle.variants import Space

ENGINES: dict[str, Callable[[PuzzleConfig, Scenario], Engine]] = {
    "torch": TorchEngine,
    "vllm": VLLMEngine,
    "llama.cpp": LlamaCppEngine,
    "roofline": RooflineEngine,
}

_BUSY = 0.05
"""Relative spread of a typical stack's times from which on the machine counts as busy; an idle one has 1 to 3 %. Kept
measurements may be off by as much."""


def measure_costs(run: Run, parent: Parent, space: Space, settings: ScenarioSettings | None = None) -> CostTable:
    """What every variant of every layer costs in the recipe's scenario: memory from shapes, times from the engine.

    The address holds shapes, scenario and machine but no weights: models of one shape cost the same.

    Args:
        settings: of another scenario.
    """
    run.apply_threads()
    settings = settings or run.recipe.scenario
    scenario = scenario_of(settings, run.device)
    engine = ENGINES[settings.engine](parent.config, scenario)
    environment = dict(engine.environment)
    stage = run.stage(
        "cost",
        version=3,
        settings={
            "scenario": settings.model_dump(mode="json"),
            "cost": run.recipe.cost.model_dump(mode="json"),
            "device": scenario.device,
            "environment": environment,
        },
        inputs=[model_shapes(parent.config), _names(space)],
    )
    file = stage.path / "costs.json"
    if stage.done:
        return read_parsed(file, CostTable.from_json)
    plan, batch_sizes = Plan.of(space, parent.config), tuple(dict.fromkeys(settings.batch_sizes))
    journal = Journal(stage.path / "measurements.jsonl")
    kept = KeptMeasurements(parent.config, scenario, environment)
    rows: list[CostRow] = []
    with engine.conditions():
        for batch_size in batch_sizes:
            measured = _Measuring(run, engine, plan, batch_size, journal, kept).rounds(run.recipe.cost.repeats)
            rows += cost_rows(parent.config, space, scenario, batch_size, part_times(plan, measured))
    table = CostTable(scenario=scenario, batch_sizes=batch_sizes, rows=tuple(rows), environment=environment)
    write_text(file, table.to_json())
    stage.commit(measurements=len(journal.samples))
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
class _Measuring:
    """The stacks of a plan at one batch size."""

    run: Run
    engine: Engine
    plan: Plan
    batch_size: int
    journal: Journal
    kept: KeptMeasurements

    def rounds(self, count: int) -> list[dict[str, Sample]]:
        """For each round, the samples by the name of the stack: kept ones, and measured ones where there are none.

        Measured twice as often where times scatter; what then still does is said, and not kept for later runs.
        """
        used = self._use_kept(count)
        measured = self._measure(count)
        if len(used) == len(self.plan.stacks) - 1:
            return measured
        if _scatter(measured) > _BUSY:
            count *= 2
            used, measured = set(), self._measure(count)
        if (scatter := _scatter(measured)) > _BUSY:
            self.run.log_warning(
                f"costs: prefill times at batch {self.batch_size} scatter by {scatter:.0%} over {count} rounds; "
                "close other programs or raise cost.repeats if predictions are to be exact"
            )
            return measured
        for name in self.plan.stacks.keys() - used:
            self.kept.put(self.plan.stacks[name], self.batch_size, [samples[name] for samples in measured])
        return measured

    def _use_kept(self, count: int) -> set[str]:
        """Put kept measurements into the journal, unless the pads take another time by now; names of their stacks."""
        earlier = {name: self.kept.get(stack, self.batch_size)[:count] for name, stack in self.plan.stacks.items()}
        usable = {name for name, samples in earlier.items() if len(samples) == count and name != PADS}
        if not usable or len(earlier[PADS]) < count:
            return set()
        now = [samples[PADS] for samples in self._measure(count, [PADS])]
        if _differ(now, earlier[PADS]):
            self.run.log(f"costs: kept measurements at batch {self.batch_size} are off by now; measuring anew")
            return set()
        for name in usable:
            for index, sample in enumerate(earlier[name]):
                key = self._key(name, index)
                if key not in self.journal.samples:
                    self.journal.add(key, sample)
        shown = f"{len(usable)} of {len(self.plan.stacks)} measurements at batch {self.batch_size}"
        self.run.log(f"costs: {shown} are those of an earlier run, kept in {self.kept.folder}")
        return usable

    def _measure(self, count: int, names: Sequence[str] | None = None) -> list[dict[str, Sample]]:
        """Rounds over all stacks, so that what slows the machine for a while slows all of them."""
        names = list(self.plan.stacks) if names is None else names
        keys = [self._key(name, index) for index in range(count) for name in names]
        missing = [key for key in keys if key not in self.journal.samples]
        if missing:
            with progress(f"costs at batch {self.batch_size}", len(keys), len(keys) - len(missing)) as bar:
                for key in missing:
                    self.journal.add(key, self.engine.measure(self.plan.stacks[key.stack], self.batch_size))
                    bar.advance()
        return [{name: self.journal.samples[self._key(name, index)] for name in names} for index in range(count)]

    def _key(self, stack: str, index: int) -> Key:
        return Key(stack=stack, batch_size=self.batch_size, round=index)


def _scatter(rounds: Sequence[Mapping[str, Sample]]) -> float:
    """Relative spread of the prefill times of the typical stack."""
    by_stack = [[samples[stack].prefill_ms for samples in rounds] for stack in rounds[0]]
    return statistics.median(spread(times_ms) / typical(times_ms) for times_ms in by_stack)


def _differ(now: Sequence[Sample], earlier: Sequence[Sample]) -> bool:
    """Whether a stack takes clearly more or less time than it did."""
    before, after = summarise(earlier), summarise(now)
    ratios = (after.prefill_ms / before.prefill_ms, after.decode_ms / before.decode_ms)
    return any(abs(ratio - 1) > _BUSY for ratio in ratios)


def _names(space: Space) -> str:
    return digest([[[v.name for v in layer.attention], [v.name for v in layer.ffn]] for layer in space.layers])
