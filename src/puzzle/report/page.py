"""The page: one HTML file with its style, its data and the plotting library inside, which loads nothing."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from puzzle.report import headline, numbers
from puzzle.report.data import ReportData
from puzzle.report.sections import Section, sections
from puzzle.report.table import lines, models
from puzzle.runs import write_text

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Has the browser refuse any load, whatever the plotting library might try."""


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, whole or not at all."""
    write_text(path, render(data))


def render(data: ReportData) -> str:
    """The page as HTML. Text that is not this program's own is escaped."""
    parts = sections(data)
    body = [
        _header(data),
        _navigation(parts),
        _target(data),
        _result(data),
        *(_section(part) for part in parts),
        _proof(data),
        _recipe(data),
        _versions(data),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(data.title)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n<main>",
            *body,
            f"</main>\n<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="figures">{_figures(parts)}</script>',
            f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _resource(name: str) -> str:
    return (files("puzzle.report") / name).read_text(encoding="utf-8")


def _figures(parts: Iterable[Section]) -> str:
    """Every figure by the id of its place; `<` is written as an escape, so that no text can end the script element."""
    items = (f'"{plot.anchor}": {plot.figure.to_json()}' for part in parts for plot in part.plots)
    return f"{{{', '.join(items)}}}".replace("<", "\\u003c")


def _header(data: ReportData) -> str:
    tiles = "".join(
        f'<div class="tile"><strong>{escape(tile.number)}</strong><span>{escape(tile.label)}</span>'
        f"<small>{escape(tile.detail)}</small></div>"
        for tile in headline.tiles(data)
    )
    return (
        f"<header><h1>{escape(data.title)}</h1>\n<p>Parent: {escape(data.parent)}<br>"
        f'Scenario: {escape(headline.scenario_line(data))}</p>\n<div class="tiles">{tiles}</div>\n'
        "<p class=\"note\">Quality kept is the child's metric divided by the parent's, on the test text.</p></header>"
    )


def _navigation(parts: Sequence[Section]) -> str:
    entries = {"result": "Result"} | {part.anchor: part.heading for part in parts}
    entries |= {"proof": "Proof", "recipe": "Recipe", "versions": "Versions"}
    return "<nav>" + " ".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in entries.items()) + "</nav>"


def _target(data: ReportData) -> str:
    rows = [
        [check.quantity, check.asked, check.predicted, check.measured, check.verdict] for check in headline.checks(data)
    ]
    if not rows:
        return ""
    table = _table(["", "asked", "predicted", "measured", ""], rows)
    return f'<section id="target"><h2>Target</h2>{table}</section>'


def _result(data: ReportData) -> str:
    if not data.rows:
        note = "Nothing is measured yet. These are the search's predictions."
        return f'<section id="result"><h2>Result</h2><p>{note}</p>{_prediction(data)}</section>'
    head = ["", *models(data.rows).values(), "child / parent"]
    body, notes, group = "", "", ""
    for line in lines(data.rows):
        if line.metric.group != group:
            group = line.metric.group
            body += f'<tr class="group"><th colspan="{len(head)}" scope="rowgroup">{escape(group)}</th></tr>\n'
        cells = "".join(
            f"<td{_bold(model)}>{_exact(value, cell)}</td>"
            for model, value, cell in zip(models(data.rows), line.values, line.cells, strict=True)
        )
        body += f'<tr><th scope="row">{escape(line.metric.label)}</th>{cells}<td>{escape(line.kept)}</td></tr>\n'
        if line.metric.meaning:
            notes += f"<dt>{escape(line.metric.label)}</dt><dd>{escape(line.metric.meaning)}</dd>"
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<section id="result"><h2>Result</h2>\n<p>Speed in the scenario: {escape(headline.scenario_line(data))}. '
        "Throughput counts generated tokens only.</p>\n"
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
        f"<details><summary>How each number is defined</summary><dl>{notes}</dl></details></section>"
    )


def _bold(model: str) -> str:
    return ' class="child"' if model == "child" else ""


def _exact(value: float | None, cell: str) -> str:
    """The rounded number, with the exact one inside for programs that read the page."""
    return escape(cell) if value is None else f'<data value="{value!r}">{escape(cell)}</data>'


def _prediction(data: ReportData) -> str:
    """The search's own numbers, for a run without measured ones."""
    formats = {
        "params": ("Parameters", numbers.count),
        "weight_bytes": ("Weights", numbers.size),
        "kv_bytes": ("KV cache", numbers.size),
        "memory_bytes": ("Memory", numbers.size),
        "prefill_ms": ("Prefill", numbers.milliseconds),
        "decode_ms": ("Decode step", numbers.milliseconds),
        "throughput_tok_s": ("Throughput, generated tokens", numbers.tokens_per_second),
    }
    totals = (data.solution.parent, data.solution.predicted)
    rows = [[label, *(show(total[key]) for total in totals)] for key, (label, show) in formats.items()]
    return _table(["", "parent, predicted", "child, predicted"], rows)


def _section(part: Section) -> str:
    plots = "".join(
        f"<figure>{f'<figcaption>{escape(plot.title)}</figcaption>' if plot.title else ''}"
        f'<div class="plot" id="{plot.anchor}" style="min-height: {plot.figure.layout.height}px"></div></figure>'
        for plot in part.plots
    )
    return (
        f'<section id="{part.anchor}"><h2>{part.heading}</h2>\n<p>{part.caption}</p>\n'
        f'<div class="{"columns" if part.columns else "rows"}">{plots}</div></section>'
    )


def _proof(data: ReportData) -> str:
    solution, proof = data.searched, data.searched.proof
    facts = {"sum of scores": numbers.plain(solution.score), "batch size": str(solution.batch_size)}
    if proof is not None:
        facts |= {
            "status": proof.status,
            "lower bound": numbers.plain(proof.bound),
            "gap": numbers.percent(proof.gap),
            "solver": f"{proof.solver}, {numbers.duration(proof.seconds)}",
        }
    meaning = (
        "<p>The lower bound holds for every architecture of the space that meets the target, at every allowed batch "
        "size. The gap is (score - bound) / score."
        + ("" if solution.blocks == data.solution.blocks else " The child is another one, better as a whole.")
        + "</p>"
    )
    return f'<section id="proof"><h2>Proof of the search</h2>\n{meaning}{_pairs(facts)}</section>'


def _recipe(data: ReportData) -> str:
    return f'<section id="recipe"><h2>Recipe</h2>\n<pre>{escape(data.recipe_yaml)}</pre></section>'


def _versions(data: ReportData) -> str:
    return f'<section id="versions"><h2>Versions</h2>\n{_pairs({**data.versions, **data.costs.environment})}</section>'


def _pairs(facts: Mapping[str, str]) -> str:
    entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<dl class="facts">{entries}</dl>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>\n<tbody>{body}</tbody></table></div>'
