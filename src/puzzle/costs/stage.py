"""The stage `cost`: every variant of every layer in the recipe's scenario, measured on the engine.

Measurements are on disk at once, for a restart and for later runs: the same stack takes the same time. They lie in the
user's cache folder, one file for each stack and batch size, addressed by the shapes of its blocks, the scenario, and
the engine's versions and device. So parents of one shape share them, whatever their weights.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import Artefact, CostRow, CostTable, Scenario
from puzzle.cache import cache_folder
from puzzle.costs.engine import Engine, Sample
from puzzle.costs.table import PADS, cost_rows, stacks_of
from puzzle.costs.timing import (
    ENGINES,
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
from puzzle.runs import Run, digest, read_parsed, write_text
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
        shapes=_shapes(parent.config),
        space=[[[v.name for v in layer.attention], [v.name for v in layer.ffn]] for layer in space.layers],
        scenario=[str(scenario), settings.batch_sizes],
        environment=environment,
    )
    file = stage.path / "costs.json"
    if stage.done:
        return read_parsed(file, CostTable.from_json)
    batch_sizes = tuple(dict.fromkeys(settings.batch_sizes))
    folder = _folder(stage.path / "measurements", shared=run.recipe.cost.reuse)
    blocks = stacks_of(space, parent.config)
    stacks = {name: Architecture(stack).configure(parent.config) for name, stack in blocks.items()}
    with engine.conditions():
        samples = _Stacks(run, engine, scenario, stacks, folder).measure(batch_sizes)
    rows: list[CostRow] = []
    for batch_size in batch_sizes:
        of_stacks = {name: samples[name, batch_size] for name in stacks}
        rows += cost_rows(parent.config, space, scenario, batch_size, of_stacks)
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


@dataclass(frozen=True, kw_only=True)
class _Kept(Artefact):
    """What is known of a stack at one batch size, and under which conditions it was measured."""

    stack: dict[str, Any]
    samples: tuple[Sample, ...]
    """One a round."""
    pads_ms: float
    """Request time of the pads then; if they take as long now, so does the stack."""
    measured: str
    """Date and time."""
    load: float
    """Programs that wanted a processor, on average over a minute."""


@dataclass(frozen=True)
class _Stacks:
    """The stacks by name: kept measurements where there are, the others measured in turns."""

    run: Run
    engine: Engine
    scenario: Scenario
    stacks: Mapping[str, PuzzleConfig]
    folder: Path

    def measure(self, batch_sizes: Sequence[int]) -> Samples:
        """As many rounds of every stack: `cost.repeats`, up to `MOST` times as many where times scatter."""
        rounds = self.run.recipe.cost.repeats
        samples: Samples = {(name, batch_size): [] for name in self.stacks for batch_size in batch_sizes}
        for batch_size in batch_sizes:
            self._use_kept(samples, batch_size, rounds)

        def error() -> float:
            """The typical stack's relative standard error, without what slowed a whole round."""
            least = min(map(len, samples.values()))
            times_ms = without_drift([self._requests_ms(each[:least]) for each in samples.values()])
            return statistics.median(map(relative_standard_error, times_ms))

        keep = partial(self._keep, samples)
        measure_in_turns(self.engine, self.stacks, samples, rounds, lambda: error() <= _PRECISION, "costs", keep)
        if (left := error()) > _PRECISION:
            self.run.log_warning(
                f"costs: times scatter, the typical stack's is known to {2 * left:.0%} only; close other programs, "
                "or raise cost.repeats and set cost.reuse: false if predictions are to be exact"
            )
        least = min(map(len, samples.values()))
        return {task: each[:least] for task, each in samples.items()}

    def _use_kept(self, samples: Samples, batch_size: int, rounds: int) -> None:
        """Take kept samples into `samples` if the pads, which are always measured, take as long as they did then."""
        found = {name: self._kept((name, batch_size)) for name in self.stacks}
        kept = {name: each for name, each in found.items() if each is not None}
        if not kept:
            return
        pads: Samples = {(PADS, batch_size): samples[PADS, batch_size]}
        measure_in_turns(self.engine, self.stacks, pads, rounds, lambda: True, "costs of the pads")
        now_ms = self._requests_ms(pads[PADS, batch_size])
        changes = {name: typical(now_ms) / each.pads_ms - 1 for name, each in kept.items()}
        allowed = max(_OFF, 2 * relative_standard_error(now_ms))
        used = [name for name, change in changes.items() if abs(change) <= allowed]
        for name in used:
            samples[name, batch_size] += kept[name].samples
        dates, load = sorted(each.measured for each in kept.values()), max(each.load for each in kept.values())
        self.run.log(
            f"costs at batch {batch_size}: {len(kept)} of {len(self.stacks) - 1} stacks are in {self.folder}, "
            f"measured from {dates[0]} to {dates[-1]} at a load of up to {load:g}; the pads take "
            f"{max(changes.values(), key=abs):+.1%} now; using {len(used)}, measuring the others"
        )

    def _kept(self, task: Task) -> _Kept | None:
        """What was measured earlier; None where nothing was, or the file is damaged."""
        try:
            return _Kept.from_json(self._file(task).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, samples: Samples, task: Task) -> None:
        name, batch_size = task
        if name == PADS:
            return
        kept = _Kept(
            stack={**self._setting, "blocks": self.stacks[name].blocks, "batch_size": batch_size},
            samples=tuple(samples[task]),
            pads_ms=typical(self._requests_ms(samples[PADS, batch_size])),
            measured=time.strftime("%Y-%m-%d %H:%M"),
            load=round(os.getloadavg()[0], 1),
        )
        with suppress(OSError):  # nothing in the folder is needed
            write_text(self._file(task), kept.to_json())

    def _file(self, task: Task) -> Path:
        name, batch_size = task
        identity = {**self._setting, "shapes": _shapes(self.stacks[name]), "batch_size": batch_size}
        return self.folder / f"{digest(identity)}.json"

    @property
    def _setting(self) -> dict[str, Any]:
        return {"scenario": asdict(self.scenario), "environment": dict(self.engine.environment)}

    def _requests_ms(self, samples: Sequence[Sample]) -> list[float]:
        return [sample.request_ms(self.scenario.generated_tokens) for sample in samples]


def _folder(own: Path, shared: bool) -> Path:
    """For measurements: in the user's cache, or `own` if that is not wanted, or cannot be written."""
    if shared:
        with suppress(OSError, RuntimeError):  # a home that is read-only, or that nobody knows
            folder = cache_folder() / "costs"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    own.mkdir(exist_ok=True)
    return own


def _shapes(config: PuzzleConfig) -> str:
    """The digest of a configuration without what says nothing of shapes."""
    no_shapes = ("_name_or_path", "transformers_version")
    return digest({name: value for name, value in config.to_dict().items() if name not in no_shapes})
