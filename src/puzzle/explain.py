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
    fields = {path: field for path, field, _ in settings(schema)}
    known = {name for path in fields for name in path.split(".")}
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
    match detail["type"]:
        case "extra_forbidden":
            problem = f"{path} is not a setting; {_suggestion(path, [*fields])}"
        case "missing":
            help_text = fields[path].description if path in fields else None
            problem = f"{path} is missing" + (f"; give: {_one_line(help_text)}" if help_text else "")
        case "value_error":
            problem = ": ".join(filter(None, [path, str(detail["ctx"]["error"])]))
        case _:
            found = repr(detail["input"])
            problem = f"{path}: {detail['msg']}, found {found if len(found) <= 60 else found[:60] + '...'}"
    return problem + (f" (and {len(others)} more: {', '.join(path for path, _ in others)})" if others else "")


def describe(schema: Schema, values: Mapping[str, Any] | None = None, part: str = "") -> str:
    """A YAML file of every setting and its default, or of `values` by path; with its help, from the docstrings.

    Args:
        values: such as `{"target.throughput": "2x"}`; sections without any of them are left out.
        part: the section or setting that is described alone; empty if there is none of that name.
    """
    lines: list[str] = []
    for path, field, section in settings(schema):
        if part and part not in (path, path.partition(".")[0]):
            continue
        name, indent = path.rpartition(".")[2], "  " * path.count(".")
        if section is not None and (values is None or any(key.startswith(f"{path}.") for key in values)):
            lines += ["", f"{name}:  # {_one_line(section.__doc__)}"]
        elif section is None and (values is None or path in values):
            value = (values or {}).get(path, "(must be given)" if field.is_required() else field.default)
            written = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()
            lines += [""] if lines and not indent else []
            lines.append(f"{indent}{name}: {written}  # {_one_line(field.description)}")
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""


def settings(schema: Schema, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Schema | None]]:
    """Every section, with its schema, and every setting by its path, such as `target.throughput`, in order."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        yield prefix + name, field, section
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")


def _suggestion(path: str, paths: list[str]) -> str:
    """The settings with the most similar name, or else those that may stand in that place."""
    section, _, name = path.rpartition(".")
    if near := difflib.get_close_matches(name, [each.rpartition(".")[2] for each in paths], n=1, cutoff=0.7):
        same = [each for each in paths if each.rpartition(".")[2] == near[0]]
        here = f"{section}.{near[0]}"
        return f"did you mean {here if here in same else ' or '.join(same)}?"
    return f"allowed here: {', '.join(each for each in paths if each.rpartition('.')[0] == section)}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
