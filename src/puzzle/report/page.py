"""The page, one HTML file that loads nothing, the model card, and tables for a terminal: one list of metrics for all.

Page and card are templates in `templates/`.
"""

import base64
import gzip
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from puzzle.artefacts import Cost, CostTable, Proof, ScoreTable, Serving, Solution, TaskScore, Totals, mean_kept
from puzzle.quantities import COSTS, QUANTITIES
from puzzle.report import figures
from puzzle.units import format_bytes, format_number, format_percent, format_ratio, format_seconds

_PACKAGES = ("puzzle-llm", "torch", "transformers", "safetensors", "highspy", "numpy")
MODELS = {"parent": "parent", "child_before": "before GKD", "child": "child", "uniform": "uniform"}
"""In the order of the table, with the names people read."""
_TIMES = {"throughput_tok_s": "tok_s", "prefill_ms": "prefill_ms", "decode_ms": "decode_ms"}
"""From the names of `Totals` to those in a model's row, after `measured_` and `predicted_`."""
Rows = Mapping[str, Mapping[str, float]]
"""Per model (`parent`, `child_before`, `child`, `uniform`) its numbers by the keys of `METRICS`."""
Tasks = Mapping[str, Mapping[str, TaskScore]]
"""Per model (`parent`, `child`, `uniform`) what it reaches in every task."""
Curve = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A finished or unfinished run. What a run does not have yet stays empty, and its part of the page is left out."""

    title: str
    recipe_yaml: str
    parent: str
    """The parent's folder or hub name."""
    solution: Solution
    scores: ScoreTable
    costs: CostTable
    proof: Proof | None = None
    """Of the lowest sum of scores; the child is another architecture if that is better as a whole."""
    uniform: Solution | None = None
    frontier: Sequence[Solution] = ()
    rows: Rows = field(default_factory=dict)
    tasks: Tasks = field(default_factory=dict)
    checks: Sequence[tuple[str, str, float, float]] = ()
    """Timed before anything was built: a model in words, `prefill_ms` or `decode_ms`, predicted and measured."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """GKD of each model: `tokens`, and `validation_kl` at some of the points."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each stage, in the order in which they ran."""
    warnings: Sequence[str] = ()


class Metric(NamedTuple):
    """One line of the result table. `meaning` is its definition, as in docs/numbers.md."""

    key: str
    group: str
    label: str
    text: Callable[[float], str]
    meaning: str


def _metrics() -> Iterable[Metric]:
    quality, speed = "quality on test text", "speed, measured on the engine"
    yield Metric("test_loss", quality, "loss", _plain, "negative log-likelihood of the next token, nats per token")
    yield Metric("top1", quality, "top-1 accuracy", format_percent, "share of next tokens that the model ranks first")
    yield Metric("kl", quality, "KL to the parent", format_number, "KL(parent || model), nats per token")
    same = "share of tokens where parent and model rank the same next token first"
    yield Metric("top1_agreement", quality, "top-1 agreement", format_percent, same)
    for key in ("params", "weight_bytes", "memory_bytes"):
        yield Metric(key, "size", QUANTITIES[key].label, QUANTITIES[key].text, QUANTITIES[key].meaning)
    yield Metric("kv_bytes", "size", "KV cache", format_bytes, "of a full batch at full length")
    for key, name in _TIMES.items():
        # The unit of throughput stands in the label: rows fit a terminal of 80 columns.
        unit, text = (", tok/s", _plain) if name == "tok_s" else ("", QUANTITIES[key].text)
        yield Metric(f"measured_{name}", speed, QUANTITIES[key].label + unit, text, QUANTITIES[key].meaning)
        yield Metric(f"predicted_{name}", speed, "  predicted", text, "")


_plain = partial(format_number, digits=4)
METRICS = tuple(_metrics())


def table_row(
    quality: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """A model's numbers by the keys of `METRICS`, from those of test text and those named as in `Totals.as_dict`."""
    row = dict(quality) | {key: predicted[key] for key in ("params", "weight_bytes", "kv_bytes", "memory_bytes")}
    for key, name in _TIMES.items():
        row |= {f"predicted_{name}": predicted[key], f"measured_{name}": measured[key]}
    return row


def _value(rows: Rows, model: str, key: str) -> float:
    """A model's number; NaN, which is written as a dash, if it is missing."""
    return rows.get(model, {}).get(key, math.nan)


def _child_over_parent(rows: Rows, key: str) -> float:
    """The child's value divided by the parent's; NaN where one is missing or the parent's is 0."""
    return _value(rows, "child", key) / (_value(rows, "parent", key) or math.nan)


def result(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and body of the result table: a line a metric with values, before each group of lines one with its name."""
    models, body = [model for model in MODELS if model in rows], []
    for group, metrics in groupby(METRICS, key=lambda metric: metric.group):
        body.append([group])
        for metric in metrics:
            values = [_value(rows, model, metric.key) for model in models]
            if any(math.isfinite(value) for value in values):
                kept = format_ratio(_child_over_parent(rows, metric.key))
                body.append([metric.label, *(metric.text(value) for value in values), kept])
    return ["", *(MODELS[model] for model in models), "child / parent"], body


def task_result(tasks: Tasks) -> tuple[list[str], list[list[str]]]:
    """The same of tasks: every model's score, and what children keep of what the parent has above chance."""
    children, parent = [model for model in tasks if model != "parent"], tasks.get("parent", {})
    body = []
    for name, own in parent.items():
        kept = [format_percent(tasks[model][name].kept(own)) for model in children]
        body.append([name, *(str(scores[name]) for scores in tasks.values()), *kept])
    means = [format_percent(mean_kept(tasks[model], parent)) for model in children]
    body.append(["mean", *("-" for _ in tasks), *means])
    return ["task", *(MODELS[model] for model in tasks), *(f"{MODELS[model]} keeps" for model in children)], body


def final_table(rows: Rows, tasks: Tasks) -> RenderableType:
    """The result tables for a terminal."""
    head, body = result(rows)
    table = _terminal(head, [line if len(line) > 1 else [] for line in body][1:])
    task_head, task_body = task_result(tasks)
    lines = [name.replace(" ", "\n") for name in task_head]  # narrow enough for 80 columns
    return Group(table, "", _terminal(lines, task_body)) if tasks else table


def answers(data: ReportData) -> list[tuple[str, str, str, str]]:
    """What was asked, predicted and measured, and a verdict, bound by bound; further scenarios are predicted only."""
    solution, generated = data.solution, data.costs.scenario.generated_tokens
    prefill_ms, decode_ms = (_value(data.rows, "child", f"measured_{name}") for name in ("prefill_ms", "decode_ms"))
    cost = Cost(prefill_ms=prefill_ms, decode_ms=decode_ms)
    measured = Totals(batch_size=solution.batch_size, generated_tokens=generated, cost=cost).as_dict()
    served: list[tuple[str, Solution | Serving, dict[str, float]]] = [("", solution, measured)]
    served += [(f" in {each.scenario} at batch {each.batch_size}", each, {}) for each in solution.further]
    found = []
    for where, serving, times in served:
        for key, bound in serving.asked.items():
            quantity, predicted = QUANTITIES[key], {**serving.predicted, "score": solution.score}[key]
            # Some is known from the architecture alone: nothing is left to measure.
            counted = quantity.exact or not quantity.columns
            actual = predicted if counted else times.get(key, math.nan)
            verdict = f"missed by {format_percent(abs(actual / bound - 1))}"
            if not math.isfinite(actual):
                verdict = "not measured"
            elif not quantity.violation(actual, bound):
                verdict = "met"
            shown = "exact" if counted else quantity.text(actual)
            found.append((_asked({key: bound}) + where, quantity.text(predicted), shown, verdict))
    return found


def _asked(bounds: Mapping[str, float]) -> str:
    written = ((QUANTITIES[key], bound) for key, bound in bounds.items())
    return ", ".join(f"{quantity.label} {quantity.direction} {quantity.text(bound)}" for quantity, bound in written)


def equal_layers(solution: Solution, parent: Sequence[str]) -> list[tuple[str, str, str]]:
    """Neighbouring layers with the same block as one entry: the layers (`2-5`), their block, and the parent's."""
    pairs, found = list(zip(solution.blocks, parent, strict=True)), []
    for (block, own), run in groupby(range(len(pairs)), key=lambda layer: pairs[layer]):
        first, *others = run
        found.append((f"{first}-{others[-1]}" if others else f"{first}", block, "the same" if block == own else own))
    return found


def solution_table(solution: Solution, parent: Sequence[str]) -> RenderableType:
    """A solution for a terminal: layers, predicted totals beside the parent's, score, proof and target."""
    totals = []
    for key, quantity in COSTS.items():
        if own := solution.parent[key]:  # 0 in tables without that cost
            value = solution.predicted[key]
            totals.append([quantity.label, quantity.text(own), quantity.text(value), format_ratio(value / own)])
    proof = solution.proof
    proven = f"{proof.status} within {proof.gap:.1e} ({proof.solver}, {proof.seconds:.2g} s)" if proof else "none"
    lines = [f"summed score: {_plain(solution.score)} at batch size {solution.batch_size}", f"proof: {proven}"]
    lines.append(f"asked: {_asked(solution.asked)}")
    for serving in solution.further:
        reached = (f"{QUANTITIES[key].label} {QUANTITIES[key].text(serving.predicted[key])}" for key in serving.asked)
        where = f"in {serving.scenario}, at batch size {serving.batch_size}"
        lines.append(f"asked {where}: {_asked(serving.asked)}; predicted: {', '.join(reached)}")
    return Group(
        _terminal(["layers", "block", "parent's"], equal_layers(solution, parent), left=3),
        "",
        _terminal(["predicted", "parent", "child", "child / parent"], totals),
        "",
        Text("\n".join(lines)),
    )


def solutions_table(solutions: Sequence[Solution], parent: Sequence[str], quantity: str) -> Table:
    """One line a solution: a quantity, absolute and as a multiple of the parent's, the score, and what has changed."""
    body = []
    for solution in solutions:
        value, proof = solution.predicted[quantity], solution.proof
        absolute, multiple = QUANTITIES[quantity].text(value), format_ratio(value / solution.parent[quantity])
        changed = sum(block != own for block, own in zip(solution.blocks, parent, strict=True))
        gap = f"{proof.gap:.0e}" if proof else "-"
        body.append([absolute, multiple, _plain(solution.score), gap, str(solution.batch_size), str(changed)])
    return _terminal([QUANTITIES[quantity].label, "x parent", "score", "gap", "batch", "layers changed"], body, left=0)


def _terminal(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table without lines; the first `left` columns are text."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=place < left)
    for row in body:
        table.add_row(*map(Text, row))
    return table


def render(data: ReportData) -> str:
    """The page as HTML."""
    parent = data.scores.parent_blocks
    marked = {"child": data.solution} | ({"uniform": data.uniform} if data.uniform else {})
    drawn = {
        "architecture": figures.architecture(data.solution, parent),
        "scores": figures.scores(data.scores, data.solution),
        "frontier": figures.frontier_figure(data.frontier, marked) if data.frontier else None,
        "training": figures.training(data.curves),
    }
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    together = ", ".join(f'"{name}": {figure.to_json()}' for name, figure in shown.items())
    scripts = [("plotly", get_plotlyjs()), ("figures", f"{{{together}}}")]  # compressed; the page unpacks them
    return _rendered(
        "page.html.j2",
        data,
        meanings={metric.label: metric.meaning for metric in METRICS if metric.meaning}
        | {name: score.meaning for name, score in data.tasks.get("parent", {}).items()},
        layers={name: equal_layers(solution, parent) for name, solution in marked.items()},
        checks=[
            [model, QUANTITIES[key].label, *map(QUANTITIES[key].text, times), f"{times[0] / times[1] - 1:+.1%}"]
            for model, key, *times in data.checks
        ],
        heights={name: figure.layout.height for name, figure in shown.items()},
        packed={name: base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() for name, text in scripts},
        versions={"python": platform.python_version()}
        | {d.name: d.version for d in distributions() if d.name in _PACKAGES},
        over_parent=partial(_child_over_parent, data.rows),
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
    values["head"], values["body"] = result(data.rows)
    values["task_head"], values["task_body"] = task_result(data.tasks)
    return environment.get_template(template).render(data=data, answers=answers(data), **values)
