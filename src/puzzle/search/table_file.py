"""The tables of any library as one file, so that it can be searched (docs/table-format.md)."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from puzzle.artefacts import COST_FIELDS, CostRow, CostTable, Part, Scenario, ScoreName, ScoreRow, ScoreTable, dump_rows
from puzzle.errors import PuzzleError
from puzzle.given import parse_json, read_given
from puzzle.recipe import PositiveInt, SearchSettings, Section, Text, validate
from puzzle.search.tables import Tables

_PARTS: tuple[Part, ...] = ("attention", "ffn", "block")
_Natural = Annotated[int, Field(ge=0, le=10**15)]  # beyond it sums are no longer exact in float64
_Milliseconds = Annotated[float, Field(ge=-1e12, le=1e12)]  # noise may make a small time negative


class _Scenario(Section):
    engine: Text = "not given"
    device: Text = "not given"
    dtype: Text = "not given"
    prompt_tokens: _Natural
    """Tokens of every prompt."""
    generated_tokens: PositiveInt
    """Tokens of every answer: a request is a prefill and this less one decode steps."""
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    """Batch sizes the search may choose from."""


class _Costs(Section):
    """A cost that is left out in every row is unknown and counts nothing. Without batch size it holds for all."""

    batch_size: PositiveInt | None = None
    params: _Natural | None = None
    weight_bytes: _Natural | None = None
    kv_bytes_per_sequence: _Natural | None = None
    prefill_ms: _Milliseconds | None = None
    decode_ms: _Milliseconds | None = None

    @property
    def given(self) -> dict[str, float]:
        return self.model_dump(include={*COST_FIELDS}, exclude_none=True)


class _Row(_Costs):
    layer: Annotated[int, Field(ge=0, lt=10_000)]
    block: Text | None = None
    attention: Text | None = None
    ffn: Text | None = None
    score: Annotated[float, Field(ge=-1e15, le=1e15)] | None = None

    @model_validator(mode="after")
    def _says_something_of_one_part(self) -> Self:
        named = [part for part in _PARTS if getattr(self, part) is not None]
        if len(named) != 1:
            raise ValueError(f"{', '.join(_PARTS)}: found {' and '.join(named) or 'none of them'}; give one")
        if self.block is None and (self.score is not None or "+" in (self.attention or self.ffn or "")):
            raise ValueError(f"{named[0]}: found a score or '+'; that is for rows of a block, such as kv8+w512")
        if self.block is not None and self.score is None and not self.given:
            raise ValueError(f"block: {self.block} has neither a score nor costs; give one of them")
        return self


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
        values = parse_json(read_given(path))
    except (ValueError, RecursionError) as error:
        raise PuzzleError(f"{path} is not JSON: {error}; docs/table-format.md describes the file") from None
    file = validate(_File, values, str(path))
    fixed = [validate(_Costs, row, f"{path}: fixed[{i}]") for i, row in enumerate(file.fixed or [{}])]
    rows = [validate(_Row, row, f"{path}: rows[{i}]") for i, row in enumerate(file.rows)]
    try:
        scores, costs = _scores(file.parent, rows), _costs(file.scenario, fixed, rows)
        tables = Tables(scores=scores, costs=costs, settings=SearchSettings(margin=0))
        for at in tables.choices[0]:
            terms, fixed_ms = at.terms["request_ms"], at.fixed["request_ms"]
            fastest_ms = fixed_ms + sum(terms[tables.group_of == layer].min() for layer in range(scores.num_layers))
            if fastest_ms <= 0 and (fixed_ms or terms.any()):
                raise ValueError(
                    f"the fastest blocks of all layers take {fastest_ms:g} ms at batch size {at.batch_size}; give in "
                    "`fixed` what no model is without, such as the times of the head"
                )
    except KeyError as error:  # of a block with a score
        layer, part, name, size = error.args[0]
        missing = f"layer {layer} has a block without costs at batch size {size}; give a row of {part} {name!r}"
        raise PuzzleError(f"{path}: {missing}") from None
    except ValueError as error:
        raise PuzzleError(f"{path}: {error}") from None
    return tables


def to_table_file(scores: ScoreTable, costs: CostTable, score: ScoreName = "kl") -> str:
    """The tables as the text of such a file: a row for each block's score, and each subblock's costs, one a line."""
    scores = scores.having(score)
    known = [name for name in ("batch_size", *COST_FIELDS) if name not in costs.unknown]
    fixed, parts = [], []
    for row in costs.rows:
        values = {name: getattr(row, name) for name in known}
        if row.part == "fixed":
            fixed.append(values)
        else:
            parts.append({"layer": row.layer, row.part: row.variant} | values)
    head = {
        "format": "puzzle-table-1",
        "scenario": {name: vars(costs.scenario)[name] for name in _Scenario.model_fields if name != "batch_sizes"}
        | {"batch_sizes": list(costs.batch_sizes)},
        "parent": scores.parent_blocks,
        "fixed": fixed,
    }
    blocks = [
        {"layer": row.layer, "block": row.block, "score": scores.value(row.layer, row.block, score)}
        for row in scores.rows
    ]
    return dump_rows(head, [*blocks, *parts])


def _scores(parent: str | list[str], given: list[_Row]) -> ScoreTable:
    """The parent's own block of each layer first, with a score of 0."""
    found: dict[tuple[int, str], float] = {}
    for place, row in enumerate(given):
        if row.score is not None and found.setdefault((row.layer, str(row.block)), row.score) != row.score:
            raise ValueError(f"rows[{place}].score: an earlier row of {row.block} has another")
    deepest = max(row.layer for row in given)
    parents = [parent] * (deepest + 1) if isinstance(parent, str) else parent
    if deepest >= len(parents):
        raise ValueError(f"rows have a layer {deepest}, parent has {len(parents)} blocks; give one each")
    rows = []
    for layer, own in enumerate(parents):
        if (layer, own) not in found:
            raise ValueError(f"layer {layer} has no score of the parent's block {own}; give a row")
        for block in (own, *(block for at, block in found if at == layer and block != own)):
            score = found[layer, block] - found[layer, own]
            nothing = dict.fromkeys(("kl_se", "lm_loss", "top1_agreement", "cosine"), 0.0)
            rows.append(ScoreRow(layer=layer, block=block, kl=score, **nothing, sequences=0))
    return ScoreTable(num_layers=len(parents), sequences=0, sequence_length=0, rows=tuple(rows))


def _costs(scenario: _Scenario, fixed: list[_Costs], given: list[_Row]) -> CostTable:
    sizes = tuple(dict.fromkeys(scenario.batch_sizes))
    rows: list[tuple[str, int, Part, _Costs]] = [(f"fixed[{i}]", -1, "fixed", row) for i, row in enumerate(fixed)]
    for i, row in enumerate(given):
        rows += [(f"rows[{i}]", row.layer, part, row) for part in _PARTS if getattr(row, part) and row.given]
    columns: dict[str, set[str]] = {}
    found: dict[tuple[int, Part, str, int], CostRow] = {}
    for where, layer, part, costs in rows:
        # An empty cell is more likely forgotten than meant as 0.
        if lacking := columns.setdefault(part, {*costs.given}) ^ {*costs.given}:
            raise ValueError(f"{where}: {min(lacking)} is given in some rows of {part} only; give it in all or none")
        if costs.batch_size not in (None, *sizes):
            allowed = ", ".join(map(str, sizes))
            raise ValueError(f"{where}.batch_size: found {costs.batch_size}; scenario.batch_sizes has {allowed}")
        for batch_size in sizes if costs.batch_size is None else [costs.batch_size]:
            key = layer, part, getattr(costs, part, ""), batch_size
            if key in found:
                raise ValueError(f"{where}: its costs at batch size {batch_size} stand in an earlier row; keep one")
            values: dict[str, Any] = dict.fromkeys(COST_FIELDS, 0) | costs.given
            found[key] = CostRow(layer=layer, part=part, variant=key[2], batch_size=batch_size, **values)
    if absent := [size for size in sizes if (-1, "fixed", "", size) not in found]:
        raise ValueError(f"fixed has no row for batch size {absent[0]}; give one, or none at all")
    known = set().union(*columns.values()) | ({"decode_ms"} if scenario.generated_tokens == 1 else set())
    return CostTable(
        scenario=Scenario(**scenario.model_dump(exclude={"batch_sizes"})),
        batch_sizes=sizes,
        rows=tuple(found.values()),
        unknown=frozenset(COST_FIELDS) - known,
    )
