"""`puzzle search`: questions to the tables of a run, or of any other library in a table file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import RenderableType

from puzzle.artefacts import CostTable, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS, SETTINGS
from puzzle.recipe import SectionT, parse_overrides, validate
from puzzle.report import frontier_figure, solution_table, solutions_table
from puzzle.runs import write_text
from puzzle.search import Tables, frontier, parent_totals, pool, solve, solve_baseline, to_table_file


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to find; without `frontier`, `pool` and `baseline` the best architecture."""

    target: list[str] = field(default_factory=list)
    """Other bounds in the main scenario, as `throughput=2x`."""
    search: list[str] = field(default_factory=list)
    """Other settings of the recipe's `search`, as `score=cosine`."""
    frontier: int | None = None
    """Number of points of the exact frontier."""
    over: str | None = None
    """Quantity of the frontier, by its setting; default: the first that the table has costs for."""
    figure: Path | None = None
    """Where to write the frontier as a page."""
    pool: int | None = None
    """Number of solutions, the best first."""
    differing: int | None = None
    """Layers in which each solution of a pool differs from all others; default: 1."""
    baseline: str | None = None
    """Name of a baseline that answers in place of the program."""
    seed: int = 0
    """Of the baseline `random`."""
    out: Path | None = None
    """Where to write the solution, or the list of them, as JSON."""
    table: Path | None = None
    """Where to write the tables as a table file."""


def answer(tables: Tables, question: Question) -> Iterator[RenderableType]:
    """What there is to print; the files that are asked for are written on the way."""
    for flag, needed in (("over", "frontier"), ("figure", "frontier"), ("differing", "pool")):
        if getattr(question, flag) is not None and getattr(question, needed) is None:
            raise PuzzleError(f"--{flag}: it belongs to a {needed}; give --{needed} N too")
    tables = replace(
        tables,
        target=_changed(tables.target, question.target, "--target"),
        settings=_changed(tables.settings, question.search, "--search"),
    )
    _check_known(tables)
    if question.table is not None:
        yield from _write(question.table, to_table_file(tables.scores, tables.costs, tables.settings.score))
    if question.frontier is not None:
        key = _quantity(tables, question.over)
        solutions = frontier(tables, key, question.frontier)
        yield from _list(tables, solutions, key, question.out)
        if question.figure is not None:
            yield from _write(question.figure, frontier_figure(solutions, {}, key).to_html())
    elif question.pool is not None:
        yield from _list(
            tables, pool(tables, question.pool, question.differing or 1), _quantity(tables, None), question.out
        )
    elif question.table is None or question.target or question.baseline or question.out:
        name = question.baseline
        solution = solve(tables) if name is None else solve_baseline(tables, name, question.seed)
        yield solution_table(solution, tables.parent)
        if question.out is not None:
            yield from _write(question.out, solution.to_json())


def _list(tables: Tables, solutions: Sequence[Solution], key: str, out: Path | None) -> Iterator[RenderableType]:
    yield solutions_table(solutions, tables.parent, key)
    if out is not None:
        yield from _write(out, json.dumps([json.loads(each.to_json()) for each in solutions], indent=1) + "\n")


def _write(path: Path, text: str) -> Iterator[str]:
    try:
        write_text(path, text)
    except (OSError, ValueError):
        raise PuzzleError(f"{path} cannot be written; name a file in a folder that exists") from None
    yield f"wrote {path}"


def _changed(section: SectionT, assignments: Sequence[str], flag: str) -> SectionT:
    """The section with other values, which go over those it has as `puzzle run --set` goes over a recipe."""
    given, name = section.model_dump(mode="json", exclude_none=True), flag.strip("-")
    changed = parse_overrides(list(assignments), flag, "throughput=2x" if name == "target" else "gap=0")
    return validate(type(section), given | {key.removeprefix(f"{name}."): changed[key] for key in changed}, name)


def _check_known(tables: Tables) -> None:
    """A bound on what has no costs would be met by everything."""
    asked: list[tuple[str, CostTable, str]] = [("search.objective", tables.costs, tables.settings.objective)]
    for name, costs, target in tables.asked:
        asked += [(f"{name}.{setting}", costs, setting) for setting, amount in target if amount is not None]
    for place, costs, setting in asked:
        known = _known(tables, costs)
        if setting == "score" or setting in known:
            continue
        lacking = [name for name in SETTINGS[setting].columns if name in costs.unknown]
        reason = f"no row has {' or '.join(lacking)}" if lacking else f"all of the table's costs for {setting} are 0"
        raise PuzzleError(f"{place}: {reason}; the table has costs for {', '.join(known) or 'nothing'}")
    score, scores = tables.settings.score, tables.known_scores
    if score != "kl" and not any(scores.value(row.layer, row.block, score) for row in scores.rows):
        raise PuzzleError(f"search.score: every {score} in the table is 0; leave it at kl")


def _known(tables: Tables, costs: CostTable) -> dict[str, str]:
    """The quantities that a table has costs for, by their setting in `target`."""
    parent = parent_totals(tables.known_scores, costs)
    return {
        quantity.setting: key
        for key, quantity in COSTS.items()
        if costs.unknown.isdisjoint(quantity.columns) and parent[key]
    }


def _quantity(tables: Tables, setting: str | None) -> str:
    known = _known(tables, tables.costs)
    if not known:
        raise PuzzleError("the table has no costs; give at least one column of them")
    if setting is None:
        return next(iter(known.values()))
    if setting not in known:
        raise PuzzleError(f"--over: found {setting}; the table has costs for {', '.join(known)}")
    return known[setting]
