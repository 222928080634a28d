"""The page, one HTML file that loads nothing, and the model card; both are templates in `templates/`."""

import base64
import gzip
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from puzzle.quantities import QUANTITIES
from puzzle.report import figures, table
from puzzle.report.table import ReportData
from puzzle.units import format_number, format_percent, format_ratio, format_seconds


def render(data: ReportData) -> str:
    """The page as HTML."""
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
        tiles=_tiles(data),
        meanings={metric.label: metric.meaning for metric in table.METRICS if metric.meaning},
        layers=table.equal_layers(data.solution, data.parent_blocks),
        checks=table.checks(data.checks),
        uniform_layers=table.equal_layers(data.uniform, data.parent_blocks) if data.uniform else [],
        heights={name: figure.layout.height for name, figure in shown.items()},
        packed={name: base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for name, text in scripts},
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
    environment.filters |= {"number": format_number, "percent": format_percent, "seconds": format_seconds}
    # What every speed and memory figure must be quoted with.
    details = "".join(f", {key.replace('_', ' ')} {value}" for key, value in data.costs.environment.items())
    values["scenario"] = f"{data.costs.scenario}, batch {data.solution.batch_size}{details}"
    values["head"], values["body"] = table.result(data.rows)
    return environment.get_template(template).render(data=data, answers=table.answers(data), **values)


def _tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Three numbers in large type, each with a label and details: speed, quality, memory; predicted until measured."""
    solution, rows = data.solution, data.rows
    speed, size = QUANTITIES["throughput_tok_s"].text, QUANTITIES["memory_bytes"].text
    parent, child = rows.get("parent", solution.parent), rows.get("child", solution.predicted)
    least, most = child["memory_bytes"], parent["memory_bytes"]
    share = f"{format_percent(least / most)} of the parent's {size(most)}"
    memory = (size(least), "of memory for weights and KV cache", share)
    if not rows:
        ratio, score = child["throughput_tok_s"] / parent["throughput_tok_s"], format_number(solution.score, 4)
        throughput = (format_ratio(ratio), "the parent's throughput, predicted", "not measured yet")
        return [throughput, (score, "sum of scores: predicted KL to the parent", "not measured yet"), memory]
    keys = ("measured_tok_s", "predicted_tok_s", "test_loss")
    measured, predicted, loss = (format_ratio(table.child_over_parent(rows, key)) for key in keys)
    absolute = f"{speed(child['measured_tok_s'])}; parent {speed(parent['measured_tok_s'])}; predicted {predicted}"
    rest = f"loss {loss} the parent's; KL {format_number(child['kl'])} nats per token"
    top1 = format_percent(table.child_over_parent(rows, "top1"))
    throughput = (measured, "the parent's throughput, measured", absolute)
    return [throughput, (top1, "of the parent's top-1 accuracy", rest), memory]
