"""The tables of any library as one file, so that it can be searched (docs/table-format.md)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from puzzle.artefacts import Cost, CostRow, CostTable, Scenario, ScoreName, ScoreRow, ScoreTable, Totals
from puzzle.artefacts.artefact import dump_rows
from puzzle.artefacts.costs import Part
from puzzle.errors import PuzzleError
from puzzle.recipe import PositiveInt, Section, TargetSettings, Text, validate
from puzzle.search.solve import Further

FORMAT = "puzzle-table-1"
_COSTS = ("params", "weight_bytes", "kv_bytes_per_sequence", "prefill_ms", "decode_ms")
_PARTS: tuple[Literal["attention", "ffn", "block"], ...] = ("attention", "ffn", "block")
_Natural = Annotated[int, Field(ge=0, le=10**15)]  # beyond it sums are no longer exact in float64
_Layer = Annotated[int, Field(ge=0, lt=10_000)]
_Milliseconds = Annotated[float, Field(ge=-1e12, le=1e12)]  # noise may make a small time negative
_Score = Annotated[float, Field(ge=-1e15, le=1e15)]


class _Scenario(Section):
    engine: Text = "not given"
    """What the times were measured with."""
    device: Text = "not given"
    """On what."""
    dtype: Text = "not given"
    """In which it is served."""
    prompt_tokens: _Natural
    """Tokens of every prompt."""
    generated_tokens: PositiveInt
    """Tokens of every answer: a request is a prefill and this less one decode steps."""
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    """Batch sizes the search may choose from."""


class _Further(_Scenario):
    target: TargetSettings
    """What the same architecture must reach there."""


class _Costs(Section):
    """A cost that is left out in every row is unknown and counts nothing."""

    scenario: _Natural | None = None
    """0 is the main one, others are counted on from 1; without it the row holds for every scenario."""
    batch_size: PositiveInt | None = None
    """Without it the row holds for every batch size."""
    params: _Natural | None = None
    weight_bytes: _Natural | None = None
    kv_bytes_per_sequence: _Natural | None = None
    """At prompt and generated tokens together."""
    prefill_ms: _Milliseconds | None = None
    """Of the whole batch."""
    decode_ms: _Milliseconds | None = None
    """One step of the whole batch."""

    @property
    def given(self) -> set[str]:
        return {name for name in _COSTS if getattr(self, name) is not None}


class _Row(_Costs):
    layer: _Layer
    block: Text | None = None
    """A whole block; without costs of its own it is `ATTENTION+FFN` and costs what these cost."""
    attention: Text | None = None
    ffn: Text | None = None
    score: _Score | None = None
    """Of a block: the lower the better, and only its difference to the parent's counts."""

    @property
    def parts(self) -> list[Literal["attention", "ffn", "block"]]:
        return [part for part in _PARTS if getattr(self, part) is not None]

    @property
    def part(self) -> Literal["attention", "ffn", "block"]:
        return self.parts[0]

    @property
    def name(self) -> str:
        name: str = getattr(self, self.part)
        return name


class _Head(Section):
    format: Literal["puzzle-table-1"]
    scenario: _Scenario
    scenarios: list[_Further] = []
    """Further ones."""
    parent: Text | Annotated[list[Text], Field(min_length=1)]
    """The parent's own block: one name for every layer, or a list with one a layer."""
    fixed: list[_Costs] = []
    """What every model has beside its layers."""
    rows: list[dict[str, Any]] | Text
    """The rows, or the name of a parquet file beside this one that holds them."""


def read_table(path: Path) -> tuple[ScoreTable, CostTable, Further]:
    """The score and the cost table in a file, and cost tables and targets of further scenarios.

    Raises:
        PuzzleError: it does not hold; names the row, counted from 0, and the column.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PuzzleError(f"{path} is not JSON: {error}; docs/table-format.md describes the file") from None
    head = validate(_Head, values, str(path))
    found = _read_parquet(path.parent / head.rows) if isinstance(head.rows, str) else head.rows
    rows = {f"{path}: rows[{place}]": values for place, values in enumerate(found)}
    return _Reader(str(path), head, {where: validate(_Row, values, where) for where, values in rows.items()}).tables()


def to_table_file(scores: ScoreTable, costs: CostTable, score: ScoreName = "kl", further: Further = ()) -> str:
    """The tables as the text of such a file: a row for each block's score, and each subblock's costs, one a line."""
    scores = scores.having(score)
    tables = [costs, *(other for other, _ in further)]
    main, *others = [asdict(table.scenario) | {"batch_sizes": list(table.batch_sizes)} for table in tables]
    targets = [{"target": target.model_dump(mode="json", exclude_none=True)} for _, target in further]
    # A file of one scenario need not say which.
    named = [
        (row, ({"scenario": place} if further else {}) | _costs_of(row, table))
        for place, table in enumerate(tables)
        for row in table.rows
    ]
    head = {
        "format": FORMAT,
        "scenario": main,
        **({"scenarios": [other | target for other, target in zip(others, targets, strict=True)]} if further else {}),
        "parent": [scores.parent_row(layer).block for layer in range(scores.num_layers)],
        "fixed": [costs for row, costs in named if row.part == "fixed"],
    }
    blocks = [
        {"layer": row.layer, "block": row.block, "score": scores.value(row.layer, row.block, score)}
        for row in scores.rows
    ]
    parts = [{"layer": row.layer, row.part: row.variant} | costs for row, costs in named if row.part != "fixed"]
    return dump_rows(head, [*blocks, *parts])


def _costs_of(row: CostRow, table: CostTable) -> dict[str, Any]:
    return {"batch_size": row.batch_size} | {name: getattr(row, name) for name in _COSTS if name not in table.unknown}


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file, empty cells as None."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise PuzzleError(f"{path} needs pyarrow; `pip install 'puzzle-llm[data]'`") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise PuzzleError(f"{path} does not exist; rows of the table file names it") from None
    except ArrowException as error:
        raise PuzzleError(f"{path} is not a parquet file: {error}") from None
    return rows


class _Reader:
    """From validated rows to the tables."""

    def __init__(self, path: str, head: _Head, rows: Mapping[str, _Row]) -> None:
        self.path, self.head, self.rows = path, head, rows
        self.scenarios: list[_Scenario] = [head.scenario, *head.scenarios]
        if not rows:
            raise PuzzleError(f"{path}: rows is empty; give at least one block a layer")
        deepest = max(row.layer for row in rows.values())
        self.parent = [head.parent] * (deepest + 1) if isinstance(head.parent, str) else head.parent
        if deepest >= len(self.parent):
            raise PuzzleError(
                f"{path}: rows have a layer {deepest}, parent has {len(self.parent)} blocks; give one each"
            )

    def tables(self) -> tuple[ScoreTable, CostTable, Further]:
        for where, row in self.rows.items():
            self._check(where, row)
        for part in _PARTS:
            _check_columns({where: row for where, row in self.rows.items() if row.part == part and row.given})
        scores, (costs, *others) = self._scores(), [self._costs(place) for place in range(len(self.scenarios))]
        for place, table in enumerate((costs, *others)):
            for scored in scores.rows:
                self._check_priced(place, table, scored.layer, scored.block)
            self._check_timed(place, scores, table)
        return scores, costs, [(other, its.target) for other, its in zip(others, self.head.scenarios, strict=True)]

    def _costs(self, place: int) -> CostTable:
        """Of the scenario in that place."""
        scenario = self.scenarios[place]
        return CostTable(
            scenario=Scenario(**scenario.model_dump(exclude={"batch_sizes", "target"})),
            batch_sizes=tuple(dict.fromkeys(scenario.batch_sizes)),
            rows=(*self._fixed(place), *self._parts(place)),
            unknown=frozenset(_COSTS) - self._given(place),
        )

    def _given(self, place: int) -> set[str]:
        """The columns that some row of a scenario has; of one token generated, decoding is known to take nothing."""
        costs: list[_Costs] = [*self.head.fixed, *self.rows.values()]
        given = set[str]().union(*(row.given for row in costs if row.scenario in (None, place)))
        return given | {"decode_ms"} if self.scenarios[place].generated_tokens == 1 else given

    def _check(self, where: str, row: _Row) -> None:
        if len(row.parts) != 1:
            raise PuzzleError(f"{where}: found {' and '.join(row.parts) or 'no name'}; give one of {', '.join(_PARTS)}")
        if row.part != "block" and (row.score is not None or "+" in row.name):
            wrong = "a score" if row.score is not None else f"'+' in {row.name}"
            raise PuzzleError(
                f"{where}.{row.part}: found {wrong}; that is for rows of a block, such as block: kv8+w512"
            )
        if row.part == "block" and row.score is None and not row.given:
            raise PuzzleError(f"{where}.score is missing, and {row.name} has no costs here either; give one of them")
        self._check_place(where, row)

    def _check_place(self, where: str, row: _Costs) -> None:
        """That its scenario is one of the file's, and its batch size one of that scenario's."""
        if row.scenario is not None and row.scenario >= len(self.scenarios):
            last = len(self.scenarios) - 1
            raise PuzzleError(f"{where}.scenario: found {row.scenario}; the file has scenarios 0 to {last}")
        meant = self.scenarios if row.scenario is None else [self.scenarios[row.scenario]]
        sizes = dict.fromkeys(size for scenario in meant for size in scenario.batch_sizes)
        if row.batch_size is not None and row.batch_size not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise PuzzleError(f"{where}.batch_size: found {row.batch_size}; scenario.batch_sizes has {allowed}")

    def _fixed(self, place: int) -> list[CostRow]:
        head = self.head.fixed or [_Costs()]  # nothing is fixed, at any batch size
        rows = {f"{self.path}: fixed[{number}]": row for number, row in enumerate(head)}
        _check_columns(rows)
        for where, row in rows.items():
            self._check_place(where, row)
        found = _unique(
            (where, cost) for where, row in rows.items() for cost in self._expand(place, -1, "fixed", "", row)
        )
        if absent := set(self.scenarios[place].batch_sizes) - {row.batch_size for row in found}:
            lacking = f"batch size {min(absent)}{self._of(place)}"
            raise PuzzleError(f"{self.path}: fixed has no row for {lacking}; give one, or none at all")
        return found

    def _parts(self, place: int) -> list[CostRow]:
        priced = {where: row for where, row in self.rows.items() if row.given}
        return _unique(
            (where, cost)
            for where, row in priced.items()
            for cost in self._expand(place, row.layer, row.part, row.name, row)
        )

    def _expand(self, place: int, layer: int, part: Part, name: str, row: _Costs) -> Iterator[CostRow]:
        """The row at each batch size of a scenario that it holds for."""
        values = {column: getattr(row, column) or 0 for column in _COSTS}
        for batch_size in dict.fromkeys(self.scenarios[place].batch_sizes):
            if row.scenario in (None, place) and row.batch_size in (None, batch_size):
                yield CostRow(layer=layer, part=part, variant=name, batch_size=batch_size, **values)

    def _check_timed(self, place: int, scores: ScoreTable, costs: CostTable) -> None:
        """That every model takes some time, if any does."""
        for batch_size in costs.batch_sizes:
            layers = [
                [self._request_ms(place, costs.block(layer, row.block, batch_size)) for row in scores.layer(layer)]
                for layer in range(scores.num_layers)
            ]
            layers.append([self._request_ms(place, costs.fixed(batch_size))])
            if (fastest := sum(map(min, layers))) <= 0 and any(map(any, layers)):
                raise PuzzleError(
                    f"{self.path}: the fastest blocks of all layers take {fastest:g} ms at batch size {batch_size}"
                    f"{self._of(place)}; give in `fixed` what no model is without, such as the times of the head"
                )

    def _request_ms(self, place: int, cost: Cost) -> float:
        generated_tokens = self.scenarios[place].generated_tokens
        return Totals(batch_size=1, generated_tokens=generated_tokens, cost=cost).request_ms

    def _of(self, place: int) -> str:
        return f" of scenario {place}" if len(self.scenarios) > 1 else ""

    def _scores(self) -> ScoreTable:
        """One score a block, in the order of the rows, the parent's own block first and 0."""
        found: dict[tuple[int, str], float] = {}
        for where, row in self.rows.items():
            if row.score is not None and found.setdefault((row.layer, row.name), row.score) != row.score:
                earlier = found[row.layer, row.name]
                raise PuzzleError(f"{where}.score: found {row.score:g}, an earlier row of {row.name} has {earlier:g}")
        rows = []
        for layer, parent in enumerate(self.parent):
            if (layer, parent) not in found:
                raise PuzzleError(f"{self.path}: layer {layer} has no score of the parent's block {parent}; give a row")
            own = found[layer, parent]
            blocks = [parent, *(block for at, block in found if at == layer and block != parent)]
            rows += [_score_row(layer, block, found[layer, block] - own) for block in blocks]
        return ScoreTable(num_layers=len(self.parent), sequences=0, sequence_length=0, rows=tuple(rows))

    def _check_priced(self, place: int, costs: CostTable, layer: int, block: str) -> None:
        for batch_size in costs.batch_sizes:
            try:
                costs.block(layer, block, batch_size)
            except KeyError as error:
                _, part, name, _ = error.args[0]
                lacking = f"its {part} {name!r} has none" if "+" in block else "it has no subblocks"
                raise PuzzleError(
                    f"{self.path}: layer {layer} block {block} has no costs at batch size "
                    f"{batch_size}{self._of(place)}, and {lacking}; give a row of them"
                ) from None


def _score_row(layer: int, block: str, score: float) -> ScoreRow:
    return ScoreRow(
        layer=layer, block=block, kl=score, kl_se=0.0, lm_loss=0.0, top1_agreement=0.0, cosine=0.0, sequences=0
    )


def _check_columns(rows: dict[str, _Costs]) -> None:
    """A cost is given in all rows of a kind or in none: an empty cell is more likely forgotten than meant as 0."""
    everywhere = {column: where for where, row in reversed(rows.items()) for column in row.given}
    for where, row in rows.items():
        for column in _COSTS:
            if column in everywhere and column not in row.given:
                other = everywhere[column].rpartition(": ")[2]
                raise PuzzleError(f"{where}.{column} is missing; {other} has it, so give it in all rows of that kind")


def _unique(rows: Iterator[tuple[str, CostRow]]) -> list[CostRow]:
    seen: dict[tuple[int, str, str, int], str] = {}
    found: list[CostRow] = []
    for where, row in rows:
        key = (row.layer, row.part, row.variant, row.batch_size)
        if key in seen:
            earlier = seen[key].rpartition(": ")[2]
            raise PuzzleError(f"{where}: the costs at batch size {row.batch_size} stand in {earlier} already; keep one")
        seen[key] = where
        found.append(row)
    return found
