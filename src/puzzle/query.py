"""`puzzle search`: questions to the tables of a run, or of any other library in a table file."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType

from puzzle.artefacts import CostTable, ScoreTable, Solution
from puzzle.errors import PuzzleError
from puzzle.quantities import COSTS, SETTINGS
from puzzle.recipe import SearchSettings, SectionT, TargetSettings, parse_overrides, validate
from puzzle.report import frontier_figure, solution_table, solutions_table
from puzzle.runs import write_text
from puzzle.search import (
    Evaluator,
    Further,
    frontier,
    parent_totals,
    pool,
    read_table,
    solve,
    solve_baseline,
    to_table_file,
)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is searched, and for what."""

    scores: ScoreTable
    costs: CostTable
    target: TargetSettings
    settings: SearchSettings
    further: Further = ()
    """Scenarios that the same architecture must serve too, with their own targets."""
    influence: Callable[[], Sequence[float]] | None = None
    """Reads the block influence of each layer, for the baseline `depth`."""
    evaluate: Evaluator | None = None
    """The true loss of architectures, for the baseline `evolutionary`."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those of a table file, which is taken at its word: no margin."""
        scores, costs, further = read_table(path)
        settings = SearchSettings(margin=0)
        return cls(scores=scores, costs=costs, target=TargetSettings(), settings=settings, further=further)

    @cached_property
    def parent(self) -> list[str]:
        """The parent's own block of each layer."""
        return [self.scores.parent_row(layer).block for layer in range(self.scores.num_layers)]

    @cached_property
    def known(self) -> dict[str, str]:
        """The quantities of which the table has costs, by their setting in `target`."""
        return self.known_of(self.costs)

    def known_of(self, costs: CostTable) -> dict[str, str]:
        """The same in one of the scenarios."""
        totals = parent_totals(self.scores, costs)
        given = {name: quantity for name, quantity in COSTS.items() if costs.unknown.isdisjoint(quantity.columns)}
        return {quantity.setting: name for name, quantity in given.items() if totals[name]}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to find; without `frontier`, `pool` and `baseline` the best architecture."""

    target: Sequence[str] = field(default_factory=list)
    """Other bounds in the main scenario, as `throughput=2x`."""
    search: Sequence[str] = field(default_factory=list)
    """Other settings of the recipe's `search`, as `score=cosine`."""
    frontier: int | None = None
    """So many points of the exact frontier,"""
    over: str | None = None
    """of this quantity, by its setting; the first that the table knows."""
    figure: Path | None = None
    """Where to write the frontier as a page."""
    pool: int | None = None
    """So many solutions, the best first,"""
    differing: int | None = None
    """each with so many layers unlike those of any other; 1 if not given."""
    baseline: str | None = None
    """By this baseline in place of the program."""
    seed: int = 0
    """Of the baseline."""
    out: Path | None = None
    """Where to write the solution, or the list of them, as JSON."""
    table: Path | None = None
    """Where to write the tables as a table file."""


def print_solution(solution: Solution, tables: Tables) -> None:
    """Print a solution that was found before."""
    Console().print(solution_table(solution, tables.parent))


def print_answer(tables: Tables, question: Question) -> None:
    """Print what `answer` yields."""
    console = Console()
    for part in answer(tables, question):
        console.print(part)


def answer(tables: Tables, question: Question) -> Iterator[RenderableType]:
    """What there is to print; the files that are asked for are written on the way."""
    target = _changed(tables.target, question.target, "--target")
    settings = _changed(tables.settings, question.search, "--search")
    _check_known(tables, target, settings)
    for flag, of in (("over", "frontier"), ("figure", "frontier"), ("differing", "pool")):
        if getattr(question, flag) is not None and getattr(question, of) is None:
            raise PuzzleError(f"--{flag}: it belongs to a {of}; give --{of} N too")
    for flag in ("out", "figure", "table"):
        _check_writable(getattr(question, flag), flag)
    if question.table is not None:
        yield from _write(question.table, to_table_file(tables.scores, tables.costs, settings.score, tables.further))
    if question.frontier is not None:
        yield from _answer_frontier(tables, target, settings, question, question.frontier)
    elif question.pool is not None:
        count, further = question.pool, tables.further
        differing = 1 if question.differing is None else question.differing
        solutions = pool(tables.scores, tables.costs, target, settings, count, differing, further=further)
        yield from _list(tables, solutions, _over(tables, None), question.out)
    elif question.table is None or question.target or question.baseline or question.out:
        solution = _solve(tables, target, settings, question)
        yield solution_table(solution, tables.parent)
        yield from _write(question.out, solution.to_json())


def _answer_frontier(
    tables: Tables, target: TargetSettings, settings: SearchSettings, question: Question, points: int
) -> Iterator[RenderableType]:
    quantity = _over(tables, question.over)
    solutions = frontier(tables.scores, tables.costs, target, settings, quantity, points, further=tables.further)
    yield from _list(tables, solutions, quantity, question.out)
    if question.figure is not None:
        yield from _write(question.figure, frontier_figure(solutions, {}, quantity).to_html())


def _list(tables: Tables, solutions: Sequence[Solution], quantity: str, out: Path | None) -> Iterator[RenderableType]:
    yield solutions_table(solutions, tables.parent, quantity)
    yield from _write(out, json.dumps([json.loads(each.to_json()) for each in solutions], indent=1) + "\n")


def _solve(tables: Tables, target: TargetSettings, settings: SearchSettings, question: Question) -> Solution:
    if question.baseline is None:
        return solve(tables.scores, tables.costs, target, settings, further=tables.further)
    return solve_baseline(
        question.baseline,
        tables.scores,
        tables.costs,
        target,
        settings,
        seed=question.seed,
        evaluate=tables.evaluate,
        influence=tables.influence() if tables.influence else None,
        further=tables.further,
    )


def _changed(section: SectionT, assignments: Sequence[str], flag: str) -> SectionT:
    """The section with other values, which go over those it has as `puzzle run --set` goes over a recipe."""
    given, name = section.model_dump(mode="json", exclude_none=True), flag.strip("-")
    changed = parse_overrides(list(assignments), flag, "throughput=2x" if name == "target" else "gap=0")
    return validate(type(section), given | {key.removeprefix(f"{name}."): changed[key] for key in changed}, name)


def _check_known(tables: Tables, target: TargetSettings, settings: SearchSettings) -> None:
    """A bound on what has no costs would be met by everything."""
    asked = [("target", tables.costs, target)]
    asked += [(f"scenarios[{at}].target", costs, its) for at, (costs, its) in enumerate(tables.further)]
    places: list[tuple[str, CostTable, str]] = [("search.objective", tables.costs, settings.objective)]
    places += [
        (f"{where}.{setting}", costs, setting)
        for where, costs, its in asked
        for setting in its.model_dump(exclude_none=True)
    ]
    for place, costs, setting in places:
        known = tables.known_of(costs)
        if setting != "score" and setting not in known:
            lacking = [name for name in SETTINGS[setting].columns if name in costs.unknown]
            reason = (
                f"no row has {' or '.join(lacking)}" if lacking else f"all of the table's costs for {setting} are 0"
            )
            raise PuzzleError(f"{place}: {reason}; the table has costs for {', '.join(known) or 'nothing'}")
    rows = tables.scores.having(settings.score).rows
    if settings.score != "kl" and not any(tables.scores.value(row.layer, row.block, settings.score) for row in rows):
        raise PuzzleError(f"search.score: every {settings.score} in the table is 0; leave it at kl")


def _check_writable(path: Path | None, flag: str) -> None:
    if path is None:
        return
    if path.is_dir():
        raise PuzzleError(f"--{flag}: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise PuzzleError(f"--{flag}: the folder {path.parent} does not exist; make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise PuzzleError(f"--{flag}: nothing can be written to {path.parent}; name another file")


def _over(tables: Tables, setting: str | None) -> str:
    if not tables.known:
        raise PuzzleError("the table has no costs; give at least one column of them")
    if setting is None:
        return next(iter(tables.known.values()))
    if setting not in tables.known:
        raise PuzzleError(f"--over: found {setting}; the table has costs for {', '.join(tables.known)}")
    return tables.known[setting]


def _write(path: Path | None, text: str) -> Iterator[str]:
    if path is not None:
        write_text(path, text)
        yield f"wrote {path}"
