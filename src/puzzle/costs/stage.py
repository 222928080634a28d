"""The stage `costs`: every variant of every layer in the recipe's scenario, measured on the engine."""

import statistics
from collections.abc import Callable, Mapping

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.blocks import Space
from puzzle.costs.engine import Engine, Sample, spread, typical
from puzzle.costs.journal import Journal, Key
from puzzle.costs.roofline import RooflineEngine
from puzzle.costs.slopes import Plan
from puzzle.costs.table import cost_rows, part_times
from puzzle.costs.torch_engine import TorchEngine
from puzzle.costs.vllm_engine import VLLMEngine
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress, write_text

ENGINES: dict[str, Callable[[PuzzleConfig, Scenario], Engine]] = {
    "torch": TorchEngine,
    "vllm": VLLMEngine,
    "roofline": RooflineEngine,
}

_BUSY = 0.05
"""Relative spread of a typical stack's times from which on the machine counts as busy; an idle one has 1 to 3 %."""

_NOT_SHAPES = ("_name_or_path", "transformers_version")


def measure_costs(run: Run, parent: Parent, space: Space) -> CostTable:
    """What every variant of every layer costs in the recipe's scenario: memory from shapes, times from the engine.

    The address holds shapes, scenario and machine but no weights: models of one shape cost the same.
    """
    run.apply_threads()
    settings = run.recipe.scenario
    scenario = Scenario(
        engine=settings.engine,
        device=settings.machine if settings.engine == "roofline" else str(run.device),
        dtype=settings.dtype,
        prompt_tokens=settings.prompt_tokens,
        generated_tokens=settings.generated_tokens,
    )
    engine = ENGINES[settings.engine](parent.config, scenario)
    environment = dict(engine.environment)
    stage = run.stage(
        "costs",
        version=2,
        settings={
            "scenario": settings.model_dump(mode="json"),
            "cost": run.recipe.cost.model_dump(mode="json"),
            "device": scenario.device,
            "environment": environment,
        },
        inputs=[_shapes(parent.config), _names(space)],
    )
    file = stage.path / "costs.json"
    if stage.done:
        return CostTable.from_json(file.read_text(encoding="utf-8"))
    plan, batch_sizes = Plan.of(space, parent.config), tuple(dict.fromkeys(settings.batch_sizes))
    journal = Journal(stage.path / "measurements.jsonl")
    _measure(engine, plan, batch_sizes, run.recipe.cost.repeats, journal)
    rows: list[CostRow] = []
    for batch_size in batch_sizes:
        rounds = _rounds(journal.samples, batch_size, run.recipe.cost.repeats)
        _warn_if_busy(run, batch_size, rounds)
        rows += cost_rows(parent.config, space, scenario, batch_size, part_times(plan, rounds))
    table = CostTable(scenario=scenario, batch_sizes=batch_sizes, rows=tuple(rows), environment=environment)
    write_text(file, table.to_json())
    stage.commit(measurements=len(journal.samples))
    return table


def _measure(engine: Engine, plan: Plan, batch_sizes: tuple[int, ...], repeats: int, journal: Journal) -> None:
    """Rounds over all stacks, so that what slows the machine for a while slows all of them."""
    keys = [
        Key(stack=stack, batch_size=batch_size, round=index)
        for batch_size in batch_sizes
        for index in range(repeats)
        for stack in plan.stacks
    ]
    missing = [key for key in keys if key not in journal.samples]
    if not missing:
        return
    with progress("costs", len(keys), len(keys) - len(missing)) as bar, engine.conditions():
        for key in missing:
            journal.add(key, engine.measure(plan.stacks[key.stack], key.batch_size))
            bar.advance()


def _rounds(samples: Mapping[Key, Sample], batch_size: int, repeats: int) -> list[dict[str, Sample]]:
    """For each round at one batch size, the samples by the name of the stack."""
    rounds: list[dict[str, Sample]] = [{} for _ in range(repeats)]
    for key, sample in samples.items():
        if key.batch_size == batch_size:
            rounds[key.round][key.stack] = sample
    return rounds


def _warn_if_busy(run: Run, batch_size: int, rounds: list[dict[str, Sample]]) -> None:
    by_stack = [[samples[stack].prefill_ms for samples in rounds] for stack in rounds[0]]
    scatter = statistics.median(spread(times_ms) / typical(times_ms) for times_ms in by_stack)
    if scatter > _BUSY:
        run.log_warning(
            f"costs: prefill times at batch {batch_size} scatter by {scatter:.0%} from round to round; "
            "close other programs or raise cost.repeats if predictions are to be exact"
        )


def _shapes(config: PuzzleConfig) -> str:
    return digest({name: value for name, value in config.to_dict().items() if name not in _NOT_SHAPES})


def _names(space: Space) -> str:
    return digest([[[v.name for v in layer.attention], [v.name for v in layer.ffn]] for layer in space.layers])
