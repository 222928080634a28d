"""Files that a person hands over, all read alike: recipes, data sheets, tables of others, text."""

import codecs
import json
from pathlib import Path
from typing import Any

import yaml

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as that of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(head: bytes) -> str:
    """What a byte order mark says, which is no part of the text; without one UTF-8."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")


def read_given(path: Path) -> str:
    """The text of a file or a pipe; a `ValueError` if it is none."""
    data = path.read_bytes()
    text = data.decode(encoding_of(data))
    if "\0" in text:
        raise ValueError("it holds NULs, as UTF-16 does; save it as UTF-8")
    return text


def parse_json(text: str | bytes) -> Any:
    """JSON in which no key is given twice; a `ValueError` if it is not."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise ValueError(f"{twice[0]} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def parse_yaml(text: str) -> Any:
    """YAML in which no key is given twice; a `ValueError` that says where, if it is not."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}") from None
        raise ValueError(str(error).splitlines()[0]) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
