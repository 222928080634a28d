"""`puzzle search`: questions to the tables of a run, or of any other library in a table file."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import RenderableType

from puzzle.artefacts import CostTable, ScoreTable
from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS, SETTINGS
from puzzle.recipe import SectionT, parse_overrides, validate
from puzzle.report import solution_table, solutions_table
from puzzle.runs import check_folder, read_parsed, read_recipe, used_folders, write_text
from puzzle.search import Demand, Tables, frontier, pool, solve, solve_baseline, to_table_file
from puzzle.stages import COST, SCORE
from puzzle.units import format_ratio


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to find, by the options of the command; without `frontier`, `pool` and `baseline` the best architecture."""

    target: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    frontier: int | None = None
    over: str | None = None
    to: float | None = None
    figure: Path | None = None
    pool: int | None = None
    differing: int | None = None
    baseline: str | None = None
    seed: int = 0
    out: Path | None = None
    table: Path | None = None


def kept_tables(run: Path) -> Tables | None:
    """The tables of a run, from its folder alone: no lock, no parent; None if its recipe has not got so far."""
    check_folder(run)
    recipe = read_recipe(run)
    done = [(name, path) for name, path in used_folders(run, recipe) if (path / "manifest.json").exists()]
    scores = [path / "scores.json" for name, path in done if name == SCORE.name]
    costs = [path / "costs.json" for name, path in done if name == COST.name]
    if len(scores) < (1 if recipe.library.coupled is None else 2) or len(costs) != len(recipe.served):
        return None
    main, *further = (read_parsed(file, CostTable.from_json) for file in costs)
    return Tables(
        scores=read_parsed(scores[-1], ScoreTable.from_json),
        costs=main,
        target=recipe.target,
        settings=recipe.search,
        further=[*zip(further, (each.target for each in recipe.scenarios), strict=True)],
    )


def answer(tables: Tables, question: Question) -> Iterator[RenderableType]:
    """What there is to print; the files that are asked for are written on the way."""
    for flag, needed in (("over", "frontier"), ("to", "frontier"), ("figure", "frontier"), ("differing", "pool")):
        if getattr(question, flag) is not None and getattr(question, needed) is None:
            raise PuzzleError(f"--{flag}: it belongs to a {needed}; give --{needed} N too")
    for file in (question.table, question.figure, question.out):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise PuzzleError(f"{file} cannot be written; name a file in a folder that exists")
    target, settings = _changed(tables.target, question.target, "target"), tables.settings
    tables = replace(tables, target=target, settings=_changed(settings, question.search, "search"))
    _check_known(tables)
    written = {question.table: to_table_file(tables.scores, tables.costs, tables.settings.score)}
    if question.frontier or question.pool:
        known = _known(tables.demands[0])
        over = question.over or next(iter(known), None)
        if over not in known:
            raise PuzzleError(f"--over: found {over}; the table has costs for {', '.join(known) or 'nothing'}")
        key = known[over]
        if question.frontier:
            found = frontier(tables, key, question.frontier, question.to or 4.0)
        else:
            found = pool(tables, question.pool or 1, question.differing or 1)
        yield solutions_table(found, tables.scores.parent_blocks, key)
        written[question.out] = json.dumps([json.loads(each.to_json()) for each in found], indent=1) + "\n"
        if question.figure:
            from puzzle.report import frontier_page

            marked = {}
            with suppress(PuzzleError):  # no target, or none that can be met
                marked["child"] = solve(tables)
            written[question.figure] = frontier_page(found, marked, key, str(tables.costs.scenario))
    elif question.table is None or question.target or question.baseline or question.out:
        name = question.baseline
        solution = solve(tables) if name is None else solve_baseline(tables, name, question.seed)
        yield solution_table(solution, tables.scores.parent_blocks)
        if name is not None:
            objective = tables.objective
            its, best = objective.reached(solution), objective.reached(solve(tables))
            shown = f"{objective.quantity.text(its)} against {objective.quantity.text(best)} of the search"
            yield f"{objective.quantity.label} {shown}: {format_ratio(its / best if best else math.nan)}"
        written[question.out] = solution.to_json()
    for file, text in written.items():
        if file is not None:
            write_text(file, text)
            yield f"wrote {file}" + (", which is searched with a margin of 0" if file == question.table else "")


def _changed(section: SectionT, assignments: list[str], name: str) -> SectionT:
    """The section with other values, which go over those it has as `puzzle run --set` goes over a recipe."""
    given = section.model_dump(mode="json", exclude_none=True)
    changed = parse_overrides(assignments, f"--{name}", "throughput=2x" if name == "target" else "gap=0")
    return validate(type(section), given | {key.removeprefix(f"{name}."): changed[key] for key in changed}, name)


def _check_known(tables: Tables) -> None:
    """A bound on what has no costs would be met by everything."""
    asked = [("search.objective", tables.demands[0], tables.settings.objective)]
    for demand in tables.demands:
        asked += [(f"{demand.setting}.{name}", demand, name) for name, amount in demand.target if amount is not None]
    for place, demand, setting in asked:
        known = _known(demand)
        if setting not in {"score", *known}:
            needed = f"rows with {' and '.join(SETTINGS[setting].columns)} above 0"
            raise PuzzleError(f"{place}: it needs {needed}; the table has costs for {', '.join(known) or 'nothing'}")
    score, scores = tables.settings.score, tables.known_scores
    if score != "kl" and not any(scores.value(row.layer, row.block, score) for row in scores.rows):
        raise PuzzleError(f"search.score: every {score} in the table is 0; leave it at kl")


def _known(demand: Demand) -> dict[str, str]:
    """The quantities that a table has costs for, by their setting in `target`."""
    unknown, parent = demand.costs.unknown, demand.parent
    return {each.setting: key for key, each in COSTS.items() if unknown.isdisjoint(each.columns) and parent[key]}
