r"""The whole method on one page, in the paper's order.

    recipe -> parent -> data -> calibrate -> library -> score --\
                 \-> costs --------------------------------- search -> correct -> realise -> refine -> distil
                                                                                  -> evaluate -> export -> report

Every property of `Pipeline` is a stage: done when it is first asked for, read back from the run folder when neither its
settings nor its inputs have changed.
"""

import json
import re
from dataclasses import asdict, replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from puzzle.artefacts import CostTable, ScoreTable, Solution, TaskScore, mean_kept
from puzzle.checks import check_recipe, slow_precision
from puzzle.child import Child, realise, refine, rounded
from puzzle.costs import is_measured, measure_costs
from puzzle.data import TokenData, prepare_data, sample_text
from puzzle.device import choose_device, fast_dtype
from puzzle.distill import distil, distillation_curve
from puzzle.engines.capability import TIMED_AS, deployable
from puzzle.errors import PuzzleError
from puzzle.evaluate import evaluate, measure_speed
from puzzle.export import export_hf
from puzzle.library import Library, Statistics, build_library, calibrate
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent, open_parent, read_config
from puzzle.plan import plan as plan_work
from puzzle.recipe import Recipe
from puzzle.report import ReportData, final_table, model_card, render, table_row
from puzzle.runs import Run, read_json, write_text
from puzzle.scores import score, true_scores
from puzzle.search import Met, Tables, correct, first_met, frontier, space_of, uniform_solution, until_met
from puzzle.stages import COMMANDS
from puzzle.tasks import check_tasks, load_tasks, run_tasks
from puzzle.variants import Space, derive_space, narrow_space


class Uniform(NamedTuple):
    """The baseline: what it is, and its weights after GKD."""

    solution: Solution
    child: Child


class Pipeline:
    """One run of the method."""

    def __init__(self, run: Run) -> None:
        self.run = run
        if (threads := run.recipe.execution.threads) is not None:
            torch.set_num_threads(threads)
        disable_progress_bar()  # transformers' own, of loading and saving; ours tell of the long steps

    @cached_property
    def parent(self) -> Parent:
        """The model we start from, found and checked."""
        parent = open_parent(self.run.recipe.parent, digests=self.run.path / "digests.json")
        if self.run.recipe.space.outer:
            parent.config.outer_type = self.run.recipe.space.outer  # of every child's configuration
        if (note := parent.path / "gguf.txt").exists():
            self.run.log(note.read_text(encoding="utf-8"))
        raw = read_json(parent.path / "config.json")
        if "auto_map" in raw and raw["model_type"] != PuzzleConfig.model_type:
            code = f"it names code of its own ({next(iter(raw['auto_map'].values()))}), which is not run"
            self.run.log_warning(f"parent: {code}; its layers are those of {raw['model_type']} in transformers")
        return parent

    @cached_property
    def sampled(self) -> Path | None:
        """Text that the parent writes, if `data.source` names it."""
        return sample_text(self.run, self.parent)

    @cached_property
    def data(self) -> TokenData:
        """The text, as packed tokens in disjoint ranges."""
        return prepare_data(self.run, self.parent)

    @cached_property
    def statistics(self) -> Statistics:
        """Moments of the parent's activations."""
        return calibrate(self.run, self.parent, self.data)

    @cached_property
    def space(self) -> Space:
        """Which variants each layer may take: those asked for that run where the child is deployed and timed."""
        return _space(self.run.recipe, self.parent.config)

    @cached_property
    def subblock_library(self) -> Library:
        """Every variant of every layer, initialised and trained for its own subblock (decoupled BLD)."""
        return build_library(self.run, self.parent, self.data, self.statistics, self.space.untyped)

    @cached_property
    def subblock_scores(self) -> ScoreTable:
        """Replace-1-block scores of every block composed of these."""
        return score(self.run, self.parent, self.data, self.subblock_library, self.space)

    @cached_property
    def preferred_space(self) -> Space:
        """Per subblock the `library.coupled` variants that the frontier uses most, and the best child's (F.1.1)."""
        tables = self._tables(self.subblock_scores)
        best = until_met(self.run, self.parent, tables).solution.blocks
        shown = [solution.blocks for solution in frontier(tables)]
        return narrow_space(self.space, shown, self.run.recipe.library.coupled or 0, always=best)

    @cached_property
    def library(self) -> Library:
        """The library that is searched; with `library.coupled`, blocks of the preferred variants trained as wholes."""
        if self.run.recipe.library.coupled is None:
            return self.subblock_library
        return build_library(self.run, self.parent, self.data, self.statistics, self.preferred_space, coupled=True)

    @cached_property
    def scores(self) -> ScoreTable:
        """Replace-1-block scores of every block of that library."""
        if self.run.recipe.library.coupled is None:
            return self.subblock_scores
        return score(self.run, self.parent, self.data, self.library, self.preferred_space)

    @cached_property
    def all_costs(self) -> list[CostTable]:
        """Memory and time of every variant on the engine, in each scenario that the child must serve."""
        return [measure_costs(self.run, self.parent, self.space, scenario) for _, scenario, _ in self.run.recipe.served]

    @property
    def costs(self) -> CostTable:
        """Those of the main scenario."""
        return self.all_costs[0]

    @cached_property
    def tables(self) -> Tables:
        """What is searched, and what `puzzle search` asks its questions to."""
        return self._tables(self.scores)

    @cached_property
    def met(self) -> Met:
        """The search repeated until its solution meets the target as measured."""
        return until_met(self.run, self.parent, self.tables)

    @property
    def searched(self) -> Solution:
        """The architecture of the lowest summed score within the bounds, with its proof."""
        return self.met.solution

    @cached_property
    def solution(self) -> Solution:
        """The best of the pool as a whole, if `correct.tokens` asks, and if it meets the target as measured."""
        if not self.run.recipe.corrected:
            return self.searched
        tables = self.met.tables
        evaluate = partial(true_scores, self.run, self.parent, self.data, self.library)
        found = correct(self.run, tables, self.searched, evaluate, self.library, self.data)
        return first_met(self.run, self.parent, tables, found.ranked)

    @cached_property
    def child_before(self) -> Child:
        """That architecture with the library's weights."""
        return realise(self.run, self.parent, self.library, self.solution.blocks)

    @cached_property
    def child_refined(self) -> Child:
        """That child with its blocks trained one after another on its own inputs, if `refine.tokens` says so."""
        return refine(self.run, self.parent, self.child_before, self.data)

    @cached_property
    def child_distilled(self) -> Child:
        """The child after global distillation (GKD), if `distil.tokens` says so."""
        return distil(self.run, self.parent, self.child_refined, self.data)

    @cached_property
    def child(self) -> Child:
        """That child with its matrices rounded to their types, if it has any."""
        return rounded(self.run, self.child_distilled, self.statistics)

    @cached_property
    def uniform(self) -> Uniform | None:
        """The honest baseline: all layers alike, as fast as the child, made and distilled in the same way."""
        if not self.run.recipe.evaluate.uniform_baseline:
            return None
        run, parent, data = self.run, self.parent, self.data
        tables = replace(self.met.tables, scores=self.subblock_scores)
        try:
            solution = uniform_solution(run, parent, self.space, tables, self.solution)
        except PuzzleError as error:  # a baseline ends no run
            run.log_warning(f"without uniform child: {error}")
            return None
        library = build_library(run, parent, data, self.statistics, space_of(parent, solution.blocks))
        refined = refine(run, parent, realise(run, parent, library, solution.blocks), data)
        return Uniform(solution, distil(run, parent, refined, data, label="uniform child"))

    @cached_property
    def rows(self) -> dict[str, dict[str, float]]:
        """The final comparison: quality on test text, sizes, predicted and measured speed of every model.

        Each at its batch size: children at that of the solution, the parent at that to which relative targets refer.
        """
        solution, models = self.solution, dict[str, Parent | Child](parent=self.parent)
        models |= {"child_before": self.child_before, "child": self.child}
        predicted = dict.fromkeys(models, solution.predicted) | {"parent": solution.parent}
        if self.uniform is not None:
            models["uniform"], predicted["uniform"] = self.uniform.child, self.uniform.solution.predicted
        measured, rows = dict[str, dict[str, float]](), {}
        if self.costs.scenario.engine != "roofline":  # which calculates
            served = {name: (model, int(predicted[name]["batch_size"])) for name, model in models.items()}
            measured = measure_speed(self.run, served, self.costs)
        for name, model in models.items():
            child = model if isinstance(model, Child) else None
            quality = evaluate(self.run, self.parent, child, self.data, name)
            rows[name] = table_row(quality, predicted[name], measured.get(name, {}))
            if idle := model.architecture.idle_params(self.parent.config):
                rows[name]["active_params"] = rows[name]["params"] - idle
        return rows

    @cached_property
    def tasks(self) -> dict[str, dict[str, TaskScore]]:
        """What parent, child and uniform child reach in the tasks of `evaluate.tasks`; empty without any."""
        if not (asked := self.run.recipe.evaluate.tasks):
            return {}
        models, tasks = dict[str, Parent | Child](parent=self.parent, child=self.child), load_tasks(asked)
        if self.uniform is not None:
            models["uniform"] = self.uniform.child
        return {name: run_tasks(self.run, name, model, tasks) for name, model in models.items()}

    @cached_property
    def exported(self) -> Path:
        """The child as a Hugging Face checkpoint, in the parent's dtype."""
        return self.export(getattr(torch, str(self.parent.config.dtype or "float32").removeprefix("torch.")))

    def export(self, dtype: torch.dtype) -> Path:
        """The same in another dtype."""
        file = self.parent.path / "README.md"
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        license = re.search(r"^license: *(\S+)", text, re.MULTILINE)
        card = model_card(self._report_data(), license[1] if license else "unknown")
        return export_hf(self.run, self.child, card, dtype)

    @cached_property
    def report(self) -> Path:
        """The page that shows it all, with `summary.json` and `architecture.json` beside it."""
        write_text(self.run.path / "architecture.json", self.child.architecture.to_json())
        asked = self.run.recipe.target.model_dump(mode="json", exclude_none=True)
        bounds = ", ".join(f"{name} {value}" for name, value in asked.items())
        target = f"{bounds} at batch {self.solution.batch_size} ({self.costs.scenario})"
        rows = {m: {key: v if isfinite(v) else None for key, v in row.items()} for m, row in self.rows.items()}
        kept = {model: mean_kept(found, self.tasks["parent"]) for model, found in self.tasks.items()}
        tasks = {model: {"kept": each if isfinite(each) else None, **self.tasks[model]} for model, each in kept.items()}
        summary = {"target": target, "rows": rows, "tasks": tasks}
        write_text(self.run.path / "summary.json", json.dumps(summary, indent=1, default=asdict) + "\n")
        child, path = self.exported, self.run.path / "report.html"
        write_text(path, render(self._report_data()))
        Console().print(final_table(self.rows, self.tasks))
        self.run.log(f"child: {child}\nreport: {path}")
        return path

    def _tables(self, scores: ScoreTable) -> Tables:
        recipe = self.run.recipe
        return Tables(
            scores=scores,
            costs=self.costs,
            target=recipe.target,
            settings=recipe.search,
            further=[*zip(self.all_costs[1:], (each.target for each in recipe.scenarios), strict=True)],
            influence=lambda: [float(self.statistics.moments(i)["influence"]) for i in range(self.parent.num_layers)],
        )

    def _report_data(self) -> ReportData:
        curves = {"child": distillation_curve(self.child_distilled)}
        if self.uniform is not None:
            curves["uniform"] = distillation_curve(self.uniform.child)
        return ReportData(
            title=f"A child of {Path(self.run.recipe.parent).name}",
            recipe_yaml=self.run.recipe.to_yaml(),
            parent=self.run.recipe.parent,
            rows=self.rows,
            tasks=self.tasks,
            checks=[
                (f"{each.model}, search {number}", each.quantity, each.predicted, each.measured)
                for number, timing in enumerate(self.met.timings, 1)
                for each in timing.times
            ],
            solution=self.solution,
            targets=[target for *_, target in self.run.recipe.served],
            searched=self.searched,
            uniform=self.uniform.solution if self.uniform is not None else None,
            frontier=frontier(self.met.tables),
            scores=self.scores,
            costs=self.costs,
            curves=curves,
            seconds=self.run.seconds(),
            warnings=self.run.warnings,
        )


def plan(recipe: Recipe, devices: str | None = None) -> list[str]:
    """What a recipe takes, in lines for a person, from the parent's config.json alone.

    Args:
        devices: such as `8xh100-sxm`; None: this machine.
    """
    config, device = read_config(recipe.parent), choose_device("cpu" if devices else recipe.execution.device)
    recipe = recipe.resolved("bfloat16" if devices else fast_dtype(device))
    check_recipe(recipe, config, here=devices is None)
    check_tasks(recipe.evaluate.tasks)
    return plan_work(recipe, config, _space(recipe, config), device, devices)


def _space(recipe: Recipe, config: PuzzleConfig) -> Space:
    space = derive_space(config, **recipe.space.model_dump(exclude={"outer", "importance"}))
    timed = [TIMED_AS[scenario.engine] for _, scenario, _ in recipe.served if scenario.engine in TIMED_AS]
    space = deployable(space, config, [*recipe.deploy, *timed])
    for path, scenario, _ in recipe.served:
        heads, ranks = config.num_attention_heads, scenario.tensor_parallel
        unshared = [f"{heads} query heads"] if heads % ranks else []
        for layer, of_layer in enumerate(space.layers):
            own = (of_layer.attention[0], of_layer.ffn[0])
            unshared += [f"{each.subblock} {each} of layer {layer}" for each in own if not each.shared_by(ranks)]
        if unshared:
            found = f"found {ranks} GPUs, among which the parent's {unshared[0]} cannot be shared"
            raise PuzzleError(f"{path}scenario.tensor_parallel: {found}; take a divisor")
        space = space.restricted(lambda _, variant: variant.shared_by(ranks))  # noqa: B023
    return space


def run_stage(run: Run, name: str) -> Pipeline:
    """Do stage `name`, and what is missing before it; `report` is the whole method.

    Raises:
        PuzzleError: before anything is done, if it is known already that a stage will refuse its settings.
    """
    pipeline = Pipeline(run)
    by_name = {stage.name: stage for stage in COMMANDS}
    reached = list(by_name)[: list(by_name).index(name) + 1]
    timed = "cost" in reached and not is_measured(run, pipeline.parent, pipeline.space)
    check_recipe(run.recipe, pipeline.parent.config, searched="search" in reached, timed=timed, here=timed)
    if "tasks" in reached:
        check_tasks(run.recipe.evaluate.tasks)
    if warning := slow_precision(run.recipe, run.device):
        run.log_warning(warning)
    getattr(pipeline, by_name[name].result)
    return pipeline
