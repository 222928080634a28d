"""A settings schema in words: every setting with its help, and what is wrong with given values, in one line."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Schema = type[BaseModel]

_REASONS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "too_short": "needs at least {min_length} entry",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "list_type": "must be a list, in square brackets",
    "model_type": "must be a section with settings under it",
    "finite_number": "must be a finite number",
}
_FOUND_MAX = 60


def explain(error: ValidationError, schema: Schema) -> str:
    """The first problem by its key, with what was found and what is allowed, and the keys of the other problems."""
    problems: dict[str, str] = {}
    vague: set[str] = set()  # of a setting of several types, what is wrong with its contents says more than its type
    for detail in error.errors(include_url=False):
        path, section = _locate(schema, detail["loc"])
        about_type = detail["type"].endswith("_type")
        if path not in problems or (path in vague and not about_type):
            problems[path] = _describe(detail, path, section, schema)
            (vague.add if about_type else vague.discard)(path)
    (first, *_), others = problems.values(), list(problems)[1:]
    return first + (f" (and {len(others)} more: {', '.join(others)})" if others else "")


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
            value = "(must be given)" if field.is_required() else _yaml(field.default)
            value = value if values is None else _yaml(values[path])
            lines.append(f"{indent}{name}: {value}  # {_one_line(field.description)}")
    return "\n".join(lines) + "\n"


def settings(schema: Schema, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every section and setting by its path, such as `target.throughput`, in order."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        section = _section(field)
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")


def _section(field: FieldInfo) -> Schema | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section_of_each(field: FieldInfo) -> Schema | None:
    """Of a list of sections."""
    arguments = get_args(field.annotation)
    return _section(FieldInfo(annotation=arguments[0])) if get_origin(field.annotation) is list else None


def _locate(schema: Schema, location: tuple[int | str, ...]) -> tuple[str, Schema]:
    """The path of a problem as a person writes it, and the section it is in."""
    path, section, inside = "", schema, True
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        field = section.model_fields.get(part)
        if field is None and not inside:
            break  # the member of a union that pydantic tried, which is no key
        path += f".{part}" if path else part
        below = field and (_section(field) or _section_of_each(field))
        section, inside = below or section, below is not None
    return path, section


def _describe(detail: Any, path: str, section: Schema, schema: Schema) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path} is not a setting; {_suggest(path, section, schema)}"
    if kind == "missing":
        field = dict(settings(schema)).get(path)
        if field is None or _section(field) is not None:
            wanted = [name for name, each in section.model_fields.items() if each.is_required()]
            return f"{path} is missing; give a section with {', '.join(wanted)}"
        description = field.description
        return f"{path} is missing" + (f"; give: {_one_line(description)}" if description else "")
    if kind == "value_error":
        return ": ".join(filter(None, (path, str(context["error"]))))
    if kind in _REASONS:
        reason = _REASONS[kind].format(**context)
    elif kind.startswith("int_"):
        reason = "must be a whole number"
    elif kind.startswith("float_"):
        reason = "must be a number"
    else:
        reason = detail["msg"]
    found = repr(detail["input"])
    return f"{path}: found {found if len(found) <= _FOUND_MAX else found[:_FOUND_MAX] + '...'}; {reason}"


def _suggest(path: str, section: Schema, schema: Schema) -> str:
    """The setting that was probably meant: a similar one here, or one of that name elsewhere; else what is allowed."""
    name = path.rpartition(".")[2]
    if near := difflib.get_close_matches(name, section.model_fields, n=1):
        return f"did you mean {path.removesuffix(name)}{near[0]}?"
    places: dict[str, list[str]] = {}
    for key, _ in settings(schema):
        places.setdefault(key.rpartition(".")[2], []).append(key)
    if near := difflib.get_close_matches(name, places, n=1, cutoff=0.8):
        return f"did you mean {' or '.join(places[near[0]])}?"
    return f"allowed here: {', '.join(section.model_fields)}"


def _yaml(value: Any) -> str:
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return dumped.removesuffix("...\n").strip()


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
