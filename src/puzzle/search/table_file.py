"""The tables of any library as one file, so that it can be searched (docs/table-format.md)."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from puzzle.artefacts import CostRow, CostTable, Part, Scenario, ScoreName, ScoreRow, ScoreTable, dump_rows
from puzzle.errors import PuzzleError
from puzzle.recipe import PositiveInt, SearchSettings, Section, Text, validate
from puzzle.search.tables import Tables

FORMAT = "puzzle-table-1"
_COSTS = ("params", "weight_bytes", "kv_bytes_per_sequence", "prefill_ms", "decode_ms")
_PARTS: tuple[Part, ...] = ("attention", "ffn", "block")
_Natural = Annotated[int, Field(ge=0, le=10**15)]  # beyond it sums are no longer exact in float64
_Milliseconds = Annotated[float, Field(ge=-1e12, le=1e12)]  # noise may make a small time negative


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


class _Costs(Section):
    """A cost that is left out in every row is unknown and counts nothing."""

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
    layer: Annotated[int, Field(ge=0, lt=10_000)]
    block: Text | None = None
    """A whole block; without costs of its own it is `ATTENTION+FFN` and costs what these cost."""
    attention: Text | None = None
    ffn: Text | None = None
    score: Annotated[float, Field(ge=-1e15, le=1e15)] | None = None
    """Of a block: the lower the better, and only its difference to the parent's counts."""

    def check(self) -> None:
        """A `ValueError` if it is not about one part, or says nothing of it."""
        named = [part for part in _PARTS if getattr(self, part) is not None]
        if len(named) != 1:
            raise ValueError(f"found {' and '.join(named) or 'no name'}; give one of {', '.join(_PARTS)}")
        if self.block is None and (self.score is not None or "+" in self.name):
            raise ValueError(f"{self.part}: found a score or '+'; that is for rows of a block, such as kv8+w512")
        if self.block is not None and self.score is None and not self.given:
            raise ValueError(f"{self.block} has neither a score nor costs; give one of them")

    @property
    def part(self) -> Part:
        return next(part for part in _PARTS if getattr(self, part) is not None)

    @property
    def name(self) -> str:
        name: str = getattr(self, self.part)
        return name


class _File(Section):
    format: Literal["puzzle-table-1"]
    scenario: _Scenario
    parent: Text | Annotated[list[Text], Field(min_length=1)]
    """The parent's own block: one name for every layer, or a list with one a layer."""
    fixed: list[dict[str, Any]] = [{}]
    """What every model has beside its layers."""
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]


def read_table(path: Path) -> Tables:
    """The tables in a file, which are taken at their word: no margin.

    Raises:
        PuzzleError: it does not hold; names the row, counted from 0, and the column.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PuzzleError(f"{path} is not JSON: {error}; docs/table-format.md describes the file") from None
    file = validate(_File, values, str(path))
    fixed = [validate(_Costs, row, f"{path}: fixed[{i}]") for i, row in enumerate(file.fixed or [{}])]
    rows = [validate(_Row, row, f"{path}: rows[{i}]") for i, row in enumerate(file.rows)]
    try:
        scores, costs = _scores(file.parent, rows), _costs(file.scenario, fixed, rows)
        _check_priced(scores, costs)
    except ValueError as error:
        raise PuzzleError(f"{path}: {error}") from None
    return Tables(scores=scores, costs=costs, settings=SearchSettings(margin=0))


def to_table_file(scores: ScoreTable, costs: CostTable, score: ScoreName = "kl") -> str:
    """The tables as the text of such a file: a row for each block's score, and each subblock's costs, one a line."""
    scores = scores.having(score)

    def costs_of(row: CostRow) -> dict[str, Any]:
        known = [name for name in _COSTS if name not in costs.unknown]
        return {"batch_size": row.batch_size} | {name: getattr(row, name) for name in known}

    head = {
        "format": FORMAT,
        "scenario": vars(costs.scenario) | {"batch_sizes": list(costs.batch_sizes)},
        "parent": scores.parent_blocks,
        "fixed": [costs_of(row) for row in costs.rows if row.part == "fixed"],
    }
    blocks = [
        {"layer": row.layer, "block": row.block, "score": scores.value(row.layer, row.block, score)}
        for row in scores.rows
    ]
    parts = [{"layer": row.layer, row.part: row.variant} | costs_of(row) for row in costs.rows if row.part != "fixed"]
    return dump_rows(head, [*blocks, *parts])


def _scores(parent: str | list[str], given: list[_Row]) -> ScoreTable:
    """The parent's own block of each layer first, with a score of 0."""
    found: dict[tuple[int, str], float] = {}
    for place, row in enumerate(given):
        try:
            row.check()
        except ValueError as error:
            raise ValueError(f"rows[{place}]: {error}") from None
        if row.score is not None and found.setdefault((row.layer, row.name), row.score) != row.score:
            raise ValueError(f"rows[{place}].score: an earlier row of {row.name} has another")
    deepest = max(row.layer for row in given)
    parents = [parent] * (deepest + 1) if isinstance(parent, str) else parent
    if deepest >= len(parents):
        raise ValueError(f"rows have a layer {deepest}, parent has {len(parents)} blocks; give one each")
    rows = []
    for layer, own in enumerate(parents):
        if (layer, own) not in found:
            raise ValueError(f"layer {layer} has no score of the parent's block {own}; give a row")
        blocks = [own, *(block for at, block in found if at == layer and block != own)]
        rows += [score_row(layer, block, found[layer, block] - found[layer, own]) for block in blocks]
    return ScoreTable(num_layers=len(parents), sequences=0, sequence_length=0, rows=tuple(rows))


def score_row(layer: int, block: str, score: float) -> ScoreRow:
    return ScoreRow(
        layer=layer, block=block, kl=score, kl_se=0.0, lm_loss=0.0, top1_agreement=0.0, cosine=0.0, sequences=0
    )


def _costs(given: _Scenario, fixed: list[_Costs], priced: list[_Row]) -> CostTable:
    sizes = tuple(dict.fromkeys(given.batch_sizes))
    rows: list[tuple[str, int, Part, str, _Costs]] = [
        *((f"fixed[{i}]", -1, "fixed", "", row) for i, row in enumerate(fixed)),
        *((f"rows[{i}]", row.layer, row.part, row.name, row) for i, row in enumerate(priced) if row.given),
    ]
    columns: dict[str, set[str]] = {}
    found: dict[tuple[int, Part, str, int], CostRow] = {}
    for where, layer, part, name, row in rows:
        # An empty cell is more likely forgotten than meant as 0.
        if lacking := columns.setdefault(part, row.given) ^ row.given:
            raise ValueError(f"{where}: {min(lacking)} is given in some rows of {part} only; give it in all or none")
        if row.batch_size not in (None, *sizes):
            allowed = ", ".join(map(str, sizes))
            raise ValueError(f"{where}.batch_size: found {row.batch_size}; scenario.batch_sizes has {allowed}")
        for batch_size in sizes if row.batch_size is None else [row.batch_size]:
            if (layer, part, name, batch_size) in found:
                raise ValueError(f"{where}: its costs at batch size {batch_size} stand in an earlier row; keep one")
            values = {column: getattr(row, column) or 0 for column in _COSTS}
            found[layer, part, name, batch_size] = CostRow(
                layer=layer, part=part, variant=name, batch_size=batch_size, **values
            )
    if absent := [size for size in sizes if (-1, "fixed", "", size) not in found]:
        raise ValueError(f"fixed has no row for batch size {absent[0]}; give one, or none at all")
    scenario = Scenario(**given.model_dump(exclude={"batch_sizes"}))
    known = set().union(*columns.values()) | ({"decode_ms"} if scenario.generated_tokens == 1 else set())
    return CostTable(
        scenario=scenario, batch_sizes=sizes, rows=tuple(found.values()), unknown=frozenset(_COSTS) - known
    )


def _check_priced(scores: ScoreTable, costs: CostTable) -> None:
    """That every block with a score has costs, and that every model takes some time, if any does."""
    timed = any(row.prefill_ms or row.decode_ms for row in costs.rows)
    for batch_size in costs.batch_sizes:
        fastest = costs.totals([], batch_size).request_ms
        for layer in range(scores.num_layers):
            try:
                each = [costs.block(layer, row.block, batch_size) for row in scores.layer(layer)]
            except KeyError as error:
                _, part, name, _ = error.args[0]
                raise ValueError(
                    f"layer {layer} has a block without costs at batch size {batch_size}; give a row of {part} {name!r}"
                ) from None
            fastest += min(cost.prefill_ms + (costs.scenario.generated_tokens - 1) * cost.decode_ms for cost in each)
        if timed and fastest <= 0:
            raise ValueError(
                f"the fastest blocks of all layers take {fastest:g} ms at batch size {batch_size}; give in `fixed` "
                "what no model is without, such as the times of the head"
            )
