"""The tables: one list of metrics for page, model card and terminal; solutions of the search for a terminal."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from puzzle.artefacts import Solution, TaskScore, mean_kept
from puzzle.quantities import COSTS, QUANTITIES
from puzzle.units import format_bytes, format_number, format_percent, format_ratio

MODELS = {"parent": "parent", "child_before": "before GKD", "child": "child", "uniform": "uniform"}
"""In the order of the table, with the names people read."""
_TIMES = {"throughput_tok_s": "tok_s", "prefill_ms": "prefill_ms", "decode_ms": "decode_ms"}
"""From the names of `Totals` to those in a model's row, after `measured_` and `predicted_`."""
Rows = Mapping[str, Mapping[str, float]]
"""Per model (`parent`, `child_before`, `child`, `uniform`) its numbers by the keys of `METRICS`."""
Tasks = Mapping[str, Mapping[str, TaskScore]]
"""Per model (`parent`, `child`, `uniform`) what it reaches in every task."""


def value(rows: Rows, model: str, key: str) -> float:
    """A model's number; NaN, which is written as a dash, if it is missing."""
    return rows.get(model, {}).get(key, math.nan)


def ratio(rows: Rows, key: str, over: str = "parent") -> str:
    """The child's number as a multiple of another model's; a dash where one is missing or the other's is 0."""
    return format_ratio(value(rows, "child", key) / (value(rows, over, key) or math.nan))


class Metric(NamedTuple):
    """One line of the result table. `meaning` is its definition, as in docs/numbers.md."""

    key: str
    group: str
    label: str
    text: Callable[[float], str]
    meaning: str
    compared: Callable[[Rows, str], str] = ratio
    """Child and parent, in the last column."""


def _metrics() -> Iterable[Metric]:
    quality, speed, loss = "quality on test text", "speed", "negative log-likelihood of the next token, nats per token"
    yield Metric("test_loss", quality, "loss", _plain, loss, lambda rows, key: "-")  # a ratio of nats says nothing
    yield Metric("perplexity", quality, "perplexity", format_number, "exponential of the loss")
    yield Metric("top1", quality, "top-1 accuracy", format_percent, "share of next tokens that the model ranks first")
    yield Metric("kl", quality, "KL to the parent", format_number, "KL(parent || model), nats per token")
    same = "share of tokens where parent and model rank the same next token first"
    yield Metric("top1_agreement", quality, "top-1 agreement", format_percent, same)
    for key in ("params", "weight_bytes", "memory_bytes"):
        yield Metric(key, "size", QUANTITIES[key].label, QUANTITIES[key].text, QUANTITIES[key].meaning)
        if key == "params":
            yield Metric("active_params", "size", "  active", QUANTITIES[key].text, "")
    yield Metric("kv_bytes", "size", "KV cache", format_bytes, "of a full batch at full length")
    batch = "at which memory and speed are given; the parent's is its fastest of those allowed, to which targets refer"
    yield Metric("batch_size", speed, "batch size", "{:.0f}".format, batch, lambda rows, key: "-")
    for key, name in _TIMES.items():
        # The unit of throughput stands in the label: rows fit a terminal of 80 columns.
        unit, text = (", tok/s", _plain) if name == "tok_s" else ("", QUANTITIES[key].text)
        label = QUANTITIES[key].label + unit
        yield Metric(f"measured_{name}", speed, label, text, f"{QUANTITIES[key].meaning}; measured on the engine")
        yield Metric(f"predicted_{name}", speed, "  predicted", text, "")


_plain = partial(format_number, digits=4)
METRICS = tuple(_metrics())


def table_row(
    quality: Mapping[str, float], predicted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, float]:
    """A model's numbers by the keys of `METRICS`: those of test text, and those named as in `Totals.as_dict`, of which
    nothing may be measured.
    """
    sizes = ("params", "weight_bytes", "kv_bytes", "memory_bytes", "batch_size")
    row = dict(quality) | {"perplexity": math.exp(quality["test_loss"])} | {key: predicted[key] for key in sizes}
    for key, name in _TIMES.items():
        row |= {f"predicted_{name}": predicted[key], f"measured_{name}": measured.get(key, math.nan)}
    return row


def result(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and body of the result table: a line a metric with values, before each group of lines one with its name."""
    models, body = [model for model in MODELS if model in rows], []
    for group, metrics in groupby(METRICS, key=lambda metric: metric.group):
        body.append([group])
        for metric in metrics:
            values = [value(rows, model, metric.key) for model in models]
            if any(map(math.isfinite, values)) or metric.key.startswith("measured"):  # the predicted one is below it
                body.append([metric.label, *map(metric.text, values), metric.compared(rows, metric.key)])
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
            its = quantity.known(solution.predicted[key])
            totals.append([quantity.label, quantity.text(own), quantity.text(its), format_ratio(its / own)])
    lines = [f"summed score: {_plain(solution.score)} at batch size {solution.batch_size}"]
    lines += [f"proof: {solution.proof}"] if solution.proof else []
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
        its, proof = QUANTITIES[quantity].known(solution.predicted[quantity]), solution.proof
        absolute, multiple = QUANTITIES[quantity].text(its), format_ratio(its / solution.parent[quantity])
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
