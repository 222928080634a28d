"""The page, one HTML file that loads nothing, and the model card; both are templates in `templates/`."""

import base64
import gzip
import platform
from functools import partial
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from puzzle.quantities import QUANTITIES
from puzzle.report import figures, table
from puzzle.report.table import ReportData
from puzzle.units import format_number, format_percent, format_ratio, format_seconds

_PACKAGES = ("puzzle-llm", "torch", "transformers", "safetensors", "highspy", "numpy")


def render(data: ReportData) -> str:
    """The page as HTML."""
    parent = data.scores.parent_blocks
    marked = {"child": data.solution} | ({"uniform": data.uniform} if data.uniform else {})
    drawn = {
        "architecture": figures.architecture(data),
        "scores": figures.scores(data),
        "frontier": figures.frontier_figure(data.frontier, marked) if data.frontier else None,
        "training": figures.training(data.curves),
    }
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    together = ", ".join(f'"{name}": {figure.to_json()}' for name, figure in shown.items())
    scripts = [("plotly", get_plotlyjs()), ("figures", f"{{{together}}}")]  # compressed; the page unpacks them
    return _rendered(
        "page.html.j2",
        data,
        meanings={metric.label: metric.meaning for metric in table.METRICS if metric.meaning},
        layers={name: table.equal_layers(solution, parent) for name, solution in marked.items()},
        checks=[
            [model, QUANTITIES[key].label, *map(QUANTITIES[key].text, times), f"{times[0] / times[1] - 1:+.1%}"]
            for model, key, *times in data.checks
        ],
        heights={name: figure.layout.height for name, figure in shown.items()},
        packed={name: base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for name, text in scripts},
        versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        over_parent=partial(table.child_over_parent, data.rows),
        quantities=QUANTITIES,
        colours=figures.COLOURS,
    )


def model_card(data: ReportData) -> str:
    """The README of an exported child, in Markdown: what it is, how it was made, what was measured, how to load it."""
    return _rendered("card.md.j2", data)


def _rendered(template: str, data: ReportData, **values: Any) -> str:
    """A template filled in; in HTML all text is escaped."""
    environment = Environment(
        loader=PackageLoader("puzzle.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for form in (format_number, format_percent, format_ratio, format_seconds):
        environment.filters[form.__name__.removeprefix("format_")] = form
    # What every speed and memory figure must be quoted with.
    details = "".join(f", {key.replace('_', ' ')} {value}" for key, value in data.costs.environment.items())
    values["scenario"] = f"{data.costs.scenario}, batch {data.solution.batch_size}{details}"
    values["head"], values["body"] = table.result(data.rows)
    return environment.get_template(template).render(data=data, answers=table.answers(data), **values)
