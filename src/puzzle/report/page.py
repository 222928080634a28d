"""The page, one HTML file that loads nothing, and the model card; both are templates in `templates/`."""

import base64
import gzip
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from puzzle.artefacts import Cost, CostTable, ScoreTable, Serving, Solution, Totals
from puzzle.quantities import COSTS, QUANTITIES
from puzzle.recipe import TargetSettings
from puzzle.report import figures
from puzzle.report.tables import METRICS, Rows, Tasks, equal_layers, ratio, result, task_result, value
from puzzle.search import resolve_bounds
from puzzle.units import format_number, format_percent, format_ratio, format_seconds

_PACKAGES = ("puzzle-llm", "torch", "transformers", "safetensors", "highspy", "numpy")


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What is known of a finished run."""

    title: str
    recipe_yaml: str
    parent: str
    """The parent's folder or hub name."""
    solution: Solution
    targets: Sequence[TargetSettings]
    """Of each scenario, the main one first."""
    scores: ScoreTable
    costs: CostTable
    rows: Rows
    frontier: Sequence[Solution]
    searched: Solution
    """That of the lowest sum of scores; the child is another architecture if that is better as a whole."""
    uniform: Solution | None = None
    tasks: Tasks = field(default_factory=dict)
    checks: Sequence[tuple[str, str, float, float]] = ()
    """Timed before anything was built: a model in words, `prefill_ms` or `decode_ms`, predicted and measured."""
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """GKD of each model: `tokens`, and `validation_kl` at some of the points."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time spent on each stage, in the order in which they ran."""
    warnings: Sequence[str] = ()


def answers(data: ReportData) -> list[tuple[str, str, str, str]]:
    """What was asked, predicted and measured, and a verdict, bound by bound; further scenarios are predicted only.

    Relative bounds are of the parent as measured, so far as it was; beside a value stands its share of the parent's.
    """
    found, solution = [], data.solution
    own, child = (_measured(data, model) for model in ("parent", "child"))
    for target, serving in zip(data.targets, solution.servings, strict=True):
        where, parent = "", serving.parent | own
        if isinstance(serving, Serving):
            where, parent, child = f" in {serving.scenario} at batch {serving.batch_size}", serving.parent, {}
        for key, bound in resolve_bounds(target, parent).items():
            quantity, predicted = QUANTITIES[key], {**serving.predicted, "score": solution.score}[key]
            # Some is known from the architecture alone: nothing is left to measure.
            counted = quantity.exact or not quantity.columns
            actual = predicted if counted else child.get(key, math.nan)
            verdict = f"missed by {format_percent(abs(actual / bound - 1))}"
            if not math.isfinite(actual):
                verdict = "not measured"
            elif not quantity.violation(actual, bound):
                verdict = "met"
            asked, shown, measured = map(quantity.text, (bound, predicted, actual))
            if (amount := getattr(target, quantity.setting)).relative:
                asked = f"{amount.text} the parent's, {asked}"
                shown += f" ({format_ratio(predicted / serving.parent[key])})"
                measured += f" ({format_ratio(actual / parent[key])})"
            asked = f"{quantity.label} {quantity.direction} {asked}{where}"
            found.append((asked, shown, "exact" if counted else measured, verdict))
    return found


def _measured(data: ReportData, model: str) -> dict[str, float]:
    """A model's speed and times, by the keys of `QUANTITIES`; nothing if they were not measured."""
    prefill_ms, decode_ms = (value(data.rows, model, f"measured_{name}") for name in ("prefill_ms", "decode_ms"))
    if not math.isfinite(prefill_ms + decode_ms):
        return {}
    size, generated = int(data.rows[model]["batch_size"]), data.costs.scenario.generated_tokens
    cost = Cost(prefill_ms=prefill_ms, decode_ms=decode_ms)
    totals = Totals(batch_size=size, generated_tokens=generated, cost=cost).as_dict()
    return {key: totals[key] for key, quantity in COSTS.items() if not quantity.exact}


def _tiles(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """The first row of the page: a number, what it is, and the figures behind it."""
    parent, child, uniform = rows["parent"], rows["child"], rows.get("uniform")
    speed, size = QUANTITIES["throughput_tok_s"].text, QUANTITIES["memory_bytes"].text
    how = "measured" if math.isfinite(child["measured_tok_s"]) else "predicted"
    detail = f"{speed(child[f'{how}_tok_s'])}; parent {speed(parent[f'{how}_tok_s'])}"
    other = f"; predicted {ratio(rows, 'predicted_tok_s')}" if how == "measured" else "; not measured"
    yield ratio(rows, f"{how}_tok_s"), f"the parent's throughput, {how}", detail + other
    if uniform:
        detail = f"{format_number(child['kl'])} nats a token against {format_number(uniform['kl'])}; it is {how} at "
        detail += f"{format_ratio(uniform[f'{how}_tok_s'] / child[f'{how}_tok_s'])} the child's speed"
        yield ratio(rows, "kl", "uniform"), "the KL to the parent of a uniform child that is as fast", detail
    detail = f"{format_number(parent['perplexity'])} to {format_number(child['perplexity'])} on test text; "
    detail += f"the parent's likeliest token in {format_percent(child['top1_agreement'])}"
    yield f"{child['perplexity'] / parent['perplexity'] - 1:+.1%}", "perplexity", detail
    share = format_percent(child["memory_bytes"] / parent["memory_bytes"])
    detail = f"{share} of the parent's {size(parent['memory_bytes'])}"
    yield size(child["memory_bytes"]), "of memory for weights and KV cache", detail


def render(data: ReportData) -> str:
    """The page as HTML."""
    parent = data.scores.parent_blocks
    marked = {"child": data.solution} | ({"uniform": data.uniform} if data.uniform else {})
    return _page(
        "page.html.j2",
        {
            "architecture": figures.architecture(data.solution, parent),
            "scores": figures.scores(data.scores, data.solution),
            "frontier": figures.frontier_figure(data.frontier, marked),
            "training": figures.training(data.curves),
        },
        **_facts(data),
        title=data.title,
        tiles=[*_tiles(data.rows)],
        meanings={metric.label: metric.meaning for metric in METRICS if metric.meaning}
        | {name: score.meaning for name, score in data.tasks.get("parent", {}).items()},
        layers={name: equal_layers(solution, parent) for name, solution in marked.items()},
        checks=[
            [model, QUANTITIES[key].label, *map(QUANTITIES[key].text, times), f"{times[0] / times[1] - 1:+.1%}"]
            for model, key, *times in data.checks
        ],
        versions={"python": platform.python_version()}
        | {d.name: d.version for d in distributions() if d.name in _PACKAGES},
        colours=figures.COLOURS,
    )


def frontier_page(frontier: Sequence[Solution], marked: Mapping[str, Solution], key: str, scenario: str) -> str:
    """The frontier alone, on a page as that of a run."""
    drawn, quantity = {"frontier": figures.frontier_figure(frontier, marked, key)}, QUANTITIES[key]
    title = f"Quality against {quantity.label}"
    return _page("frontier.html.j2", drawn, title=title, quantity=quantity, scenario=scenario)


def model_card(data: ReportData, license: str = "unknown") -> str:
    """The README of an exported child, in Markdown: what it is, how it was made, what was measured, how to load it.

    It names no folder of this machine.

    Args:
        license: the parent's, as its own card has it.
    """

    def named(value: Any) -> Any:
        if isinstance(value, dict | list):
            return {key: named(value[key]) for key in value} if isinstance(value, dict) else [*map(named, value)]
        is_path = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
        return Path(value).name if is_path else value

    recipe_yaml = yaml.safe_dump(named(yaml.safe_load(data.recipe_yaml)), sort_keys=False)
    return _rendered("card.md.j2", **_facts(data), parent=named(data.parent), license=license, recipe_yaml=recipe_yaml)


def _facts(data: ReportData) -> dict[str, Any]:
    """What page and card share."""
    # What every speed and memory figure must be quoted with.
    details = "".join(f", {key.replace('_', ' ')} {value}" for key, value in data.costs.environment.items())
    scenario = f"{data.costs.scenario}, batch {data.solution.batch_size}"
    (head, body), (task_head, task_body) = result(data.rows), task_result(data.tasks)
    tables = {"head": head, "body": body, "task_head": task_head, "task_body": task_body, "answers": answers(data)}
    return {"data": data, "scenario": scenario + details} | tables


def _page(template: str, drawn: Mapping[str, Any], **values: Any) -> str:
    """A page with figures by name; plotting library and figures are compressed, and the page unpacks them."""
    together = ", ".join(f'"{name}": {figure.to_json()}' for name, figure in drawn.items())
    scripts = [("plotly", get_plotlyjs()), ("figures", f"{{{together}}}")]
    zipped = {name: gzip.compress(text.encode(), mtime=0) for name, text in scripts}
    packed = {name: (len(content), base64.b85encode(content, pad=True).decode()) for name, content in zipped.items()}
    heights = {name: figure.layout.height for name, figure in drawn.items()}
    return _rendered(template, packed=packed, heights=heights, **values)


def _rendered(template: str, **values: Any) -> str:
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
    return environment.get_template(template).render(**values)
