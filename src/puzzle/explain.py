"""A settings schema in words: every setting with its help, and what is wrong with given values, in one line."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Schema = type[BaseModel]


def explain(error: ValidationError, schema: Schema) -> str:
    """Pydantic's first problem with the setting's path and what was found, and the paths of the other problems."""
    paths = [path for path, _ in settings(schema)]
    known = {name for path in paths for name in path.split(".")}
    problems: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        *place, last = detail["loc"] or [""]
        # Of the names, those of settings: pydantic also gives the members of a union that it tried.
        names = [part for part in place if part in known or isinstance(part, int)]
        names += [last] if last in known or isinstance(last, int) or detail["type"] == "extra_forbidden" else []
        path = ".".join(map(str, names))
        if path not in problems or problems[path]["type"].endswith(("_type", "_parsing")):
            problems[path] = detail  # of several for one setting, what is wrong with its contents says more
    (path, detail), *others = problems.items()
    found = repr(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            problem = f"{path} is not a setting; {_suggest(path, paths)}"
        case "missing":
            fields = dict(settings(schema))
            help_text = _one_line(fields[path].description) if path in fields else ""
            problem = f"{path} is missing" + (f"; give: {help_text}" if help_text else "")
        case "value_error":
            problem = ": ".join(filter(None, [path, str(detail["ctx"]["error"])]))
        case _:
            problem = f"{path}: {detail['msg']}, found {found if len(found) <= 60 else found[:60] + '...'}"
    return problem + (f" (and {len(others)} more: {', '.join(path for path, _ in others)})" if others else "")


def describe(schema: Schema, values: Mapping[str, Any] | None = None) -> str:
    """A YAML file of every setting and its default, or of `values` by path; with its help, from the docstrings.

    Args:
        values: such as `{"target.throughput": "2x"}`; sections without any of them are left out.
    """
    lines: list[str] = []
    for path, field in settings(schema):
        name, indent = path.rpartition(".")[2], "  " * path.count(".")
        section = _section(field)
        if section is not None and (values is None or any(key.startswith(f"{path}.") for key in values)):
            lines += ["", f"{name}:  # {_one_line(section.__doc__)}"]
        elif section is None and (values is None or path in values):
            lines += [""] if lines and not indent else []
            default = "(must be given)" if field.is_required() else field.default
            lines.append(
                f"{indent}{name}: {_yaml((values or {}).get(path, default))}  # {_one_line(field.description)}"
            )
    return "\n".join(lines) + "\n"


def settings(schema: Schema, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every section and setting by its path, such as `target.throughput`, in order."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        if (section := _section(field)) is not None:
            yield from settings(section, f"{prefix}{name}.")


def _section(field: FieldInfo) -> Schema | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _suggest(path: str, paths: list[str]) -> str:
    """The settings with the most similar name, or else those that may stand in that place."""
    section, _, name = path.rpartition(".")
    places: dict[str, list[str]] = {}
    for each in paths:
        places.setdefault(each.rpartition(".")[2], []).append(each)
    if near := difflib.get_close_matches(name, places, n=1, cutoff=0.7):
        here = [each for each in places[near[0]] if each == f"{section}.{near[0]}"]
        return f"did you mean {' or '.join(here or places[near[0]])}?"
    return f"allowed here: {', '.join(each for each in paths if each.rpartition('.')[0] == section)}"


def _yaml(value: Any) -> str:
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return dumped.removesuffix("...\n").strip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
