"""The stage `cost`: every variant of every layer in the recipe's scenario, measured on the engine.

Measurements are on disk at once, for a restart and for later runs: in the user's cache folder, one file for each stack
and batch size, addressed by shapes, scenario, and the engine's versions and device. So parents of one shape share them.
"""

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.costs.engine import Engine, Sample
from puzzle.costs.table import PADS, cost_rows, stacks_of
from puzzle.costs.timing import (
    ENGINES,
    Samples,
    Task,
    measure_in_turns,
    relative_standard_error,
    requests_ms,
    typical,
    without_drift,
)
from puzzle.engines.environments import cache_folder
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.recipe import ScenarioSettings
from puzzle.runs import Run, digest, read_json, read_parsed, write_json, write_text
from puzzle.stages import COST
from puzzle.variants import Architecture, Space

_PRECISION = 0.03
"""All stacks are measured again while the typical relative standard error of their request times is larger."""


def measure_costs(run: Run, parent: Parent, space: Space, settings: ScenarioSettings | None = None) -> CostTable:
    """What every variant of every layer costs in the recipe's scenario, or that of `settings`.

    Memory from shapes, times from the engine. The address holds no weights: models of one shape cost the same. Nor does
    it hold device, versions and threads: a table that is there stands, with a line where they are others by now.
    """
    settings = settings or run.recipe.scenario
    scenario = scenario_of(settings, run.device)
    engine = ENGINES[settings.engine](scenario)
    stage = run.open(COST, **_inputs(parent, space, settings))
    file = stage.path / "costs.json"
    if stage.done:
        table = read_parsed(file, CostTable.from_json)
        with suppress(PuzzleError):  # of an engine that is not installed here
            if others := [name for name, value in table.environment.items() if engine.environment[name] != value]:
                here = ", ".join(f"{name} {engine.environment[name]}" for name in others)
                then = ", ".join(f"{name} {table.environment[name]}" for name in others)
                run.log(f"costs: as measured with {then}; here are {here}; --remeasure measures again")
        return table
    environment = dict(engine.environment)
    blocks, batch_sizes = stacks_of(space, parent.config), tuple(dict.fromkeys(settings.batch_sizes))
    stacks = {name: Architecture(stack).configure(parent.config) for name, stack in blocks.items()}
    folder = stage.path / "measurements"
    if run.recipe.cost.reuse:
        with suppress(OSError, RuntimeError):  # a home that is read-only, or that nobody knows
            (shared := cache_folder() / "costs").mkdir(parents=True, exist_ok=True)
            folder = shared if os.access(shared, os.W_OK) else folder
    folder.mkdir(exist_ok=True)
    with engine.conditions():
        samples = _measure(run, engine, stacks, batch_sizes, folder)
    rows: list[CostRow] = []
    for size in batch_sizes:
        of_size = {name: samples[name, size] for name in stacks}
        rows += cost_rows(parent.config, space, scenario, size, of_size, engine.beyond_window, run.log_warning)
    table = CostTable(scenario=scenario, batch_sizes=batch_sizes, rows=tuple(rows), environment=environment)
    write_text(file, table.to_json())
    stage.commit()
    return table


def is_measured(run: Run, parent: Parent, space: Space) -> bool:
    """Whether the run folder has the tables of all scenarios, and may keep them."""
    tables = (run.folder(COST, **_inputs(parent, space, scenario))[0] for _, scenario, _ in run.recipe.served)
    return not run.remeasure and all(table.done for table in tables)


def _inputs(parent: Parent, space: Space, settings: ScenarioSettings) -> dict[str, Any]:
    shapes = read_json(parent.path / "config.json")  # what transformers makes of it differs from version to version
    scenario = scenario_of(settings, torch.device("cpu"))
    sheet = ENGINES["roofline"](scenario).environment["data sheet"] if settings.engine == "roofline" else ""
    if outer := getattr(parent.config, "outer_type", ""):
        shapes["outer_type"] = outer
    return {
        "shapes": {name: shapes[name] for name in shapes if name not in ("_name_or_path", "transformers_version")},
        "space": [[[v.name for v in layer.attention], [v.name for v in layer.ffn]] for layer in space.layers],
        "scenario": [str(scenario), sheet, settings.batch_sizes],
    }


def scenario_of(settings: ScenarioSettings, device: torch.device) -> Scenario:
    """What is measured, on the device that the engine uses if this one is there."""
    used = {"roofline": settings.machine, "llama.cpp": "cpu"}.get(settings.engine, str(device))
    return Scenario(**settings.model_dump(exclude={"machine", "batch_sizes"}), device=used)


def _measure(
    run: Run, engine: Engine, stacks: Mapping[str, PuzzleConfig], batch_sizes: Sequence[int], folder: Path
) -> Samples:
    """`cost.repeats` rounds of every stack, up to `MOST` times as many where times scatter.

    Measurements that are kept in `folder` are taken if the pads still take as long, the others measured in turns.
    """
    scenario, rounds = engine.scenario, run.recipe.cost.repeats
    samples: Samples = {(name, batch_size): [] for batch_size in batch_sizes for name in stacks}
    setting, unshaped = [scenario.identity, dict(engine.environment)], {"_name_or_path": "", "transformers_version": ""}
    shapes = {name: digest(config.to_dict() | unshaped) for name, config in stacks.items()}
    digests = {(name, size): digest([*setting, shapes[name], size]) for name, size in samples if name != PADS}
    files = {task: folder / f"{name}.json" for task, name in digests.items()}

    def keep(task: Task) -> None:
        """With the request time of the pads: if they take as long in another run, so does the stack."""
        if task in files:
            pads_ms = typical(requests_ms(samples[PADS, task[1]], scenario))
            with suppress(OSError):  # nothing in the folder is needed
                write_json(files[task], {"pads_ms": pads_ms, "samples": samples[task]})

    def error() -> float:
        """The typical stack's relative standard error, without what slowed a whole round."""
        times_ms = without_drift([requests_ms(each, scenario) for each in samples.values()])
        return statistics.median(map(relative_standard_error, times_ms))

    for batch_size in batch_sizes:
        there = [task for task in files if task[1] == batch_size and files[task].exists() and not run.remeasure]
        if not (kept := {task: read_json(files[task]) for task in there}):
            continue
        pads: Samples = {(PADS, batch_size): samples[PADS, batch_size]}
        measure_in_turns(engine, stacks, pads, rounds, lambda: True, "costs of the pads")
        now_ms = requests_ms(samples[PADS, batch_size], scenario)
        allowed = max(0.05, 2 * relative_standard_error(now_ms))
        changes = {task: typical(now_ms) / each["pads_ms"] - 1 for task, each in kept.items()}
        used = [task for task, change in changes.items() if abs(change) <= allowed]
        for task in used:
            samples[task] += itertools.starmap(Sample, kept[task]["samples"])
        run.log(
            f"costs at batch {batch_size}: of {len(stacks) - 1} stacks {len(kept)} are in {folder}; the pads take "
            f"{max(changes.values(), key=abs):+.1%} now; using {len(used)}, measuring the others"
        )
    measure_in_turns(engine, stacks, samples, rounds, lambda: error() <= _PRECISION, "costs", keep)
    if (left := error()) > _PRECISION:
        run.log_warning(
            f"costs: times scatter, the typical stack's is known to {2 * left:.0%} only; close other programs, "
            "or raise cost.repeats and set cost.reuse: false if predictions are to be exact"
        )
    return samples
