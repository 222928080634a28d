"""Artefacts as JSON files."""

import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints


class Artefact:
    """A dataclass that is a JSON file. A table, which has `rows`, has one line a row."""

    def to_json(self) -> str:
        values = asdict(self)  # type: ignore[call-overload]
        rows = values.pop("rows", None)
        return json.dumps(values, indent=1, default=sorted) + "\n" if rows is None else dump_rows(values, rows)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back from `to_json`; a `ValueError`, `TypeError` or `KeyError` if it is not from there."""
        return _built(cls, json.loads(text))


def dump_rows(head: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """JSON of `head` with a key `rows`, one line a row, so that a table can be read and compared line by line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    start = json.dumps(head | {"rows": None}, indent=1, default=sorted).removesuffix("null\n}")
    return f"{start}[\n  {lines}\n ]\n}}\n"


def _built(hint: Any, value: Any) -> Any:
    """A value of JSON as what a field's type asks for: dataclasses, tuples and frozensets; all else as it is."""
    if isinstance(hint, type) and is_dataclass(hint):
        hints = _hints(hint)
        return hint(**{name: _built(hints[name], item) for name, item in dict(value).items()})
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (tuple, frozenset):
        return origin(_built(kinds[0], item) for item in value)
    return _built(kinds[0], value) if origin in (Union, UnionType) and value is not None else value


_hints = cache(get_type_hints)
