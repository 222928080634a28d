"""The result table: every number of every model, predicted beside measured; for the page, the terminal and programs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from puzzle.report import numbers
from puzzle.report.data import MODEL_NAMES, Rows


@dataclass(frozen=True)
class Metric:
    """One line of the table. `meaning` is its definition, as in docs/numbers.md."""

    key: str
    group: str
    label: str
    format: Callable[[float], str]
    meaning: str


_THROUGHPUT = "Generated tokens per second over the whole batch, prefill time included, prompt tokens not counted."
_PREFILL = "Time from a batch of prompts to its first tokens."
_DECODE = "Time of one decode step of the whole batch, at the scenario's middle context length."

METRICS = (
    Metric("test_loss", "Quality", "Test loss", numbers.plain, "Cross-entropy on held-out test text, nats per token."),
    Metric("top1", "Quality", "Top-1 accuracy", numbers.percent, "Share of test tokens that the model ranks first."),
    Metric(
        "kl",
        "Quality",
        "KL to the parent",
        numbers.significant,
        "KL(parent || model) of the next token, nats per token.",
    ),
    Metric(
        "top1_agreement",
        "Quality",
        "Top-1 agreement",
        numbers.percent,
        "Share of test tokens where the parent and the model rank the same token first.",
    ),
    Metric("params", "Size", "Parameters", numbers.count, "All weights; tied embeddings are counted once."),
    Metric("weight_bytes", "Size", "Weights", numbers.size, "Bytes of all weights in the scenario's dtype."),
    Metric("kv_bytes", "Size", "KV cache", numbers.size, "Of a full batch with all prompt and generated tokens."),
    Metric("memory_bytes", "Size", "Memory", numbers.size, "Weights and KV cache; the engine's workspace not counted."),
    Metric("predicted_tok_s", "Speed", "Predicted throughput, tok/s", numbers.plain, _THROUGHPUT),
    Metric("measured_tok_s", "Speed", "Measured throughput, tok/s", numbers.plain, _THROUGHPUT),
    Metric("predicted_prefill_ms", "Speed", "Predicted prefill", numbers.milliseconds, _PREFILL),
    Metric("measured_prefill_ms", "Speed", "Measured prefill", numbers.milliseconds, _PREFILL),
    Metric("predicted_decode_ms", "Speed", "Predicted decode step", numbers.milliseconds, _DECODE),
    Metric("measured_decode_ms", "Speed", "Measured decode step", numbers.milliseconds, _DECODE),
)


@dataclass(frozen=True)
class Line:
    """One metric over all models; a value that a model does not have is None."""

    metric: Metric
    values: tuple[float | None, ...]
    kept: str
    """The child's value as a multiple of the parent's."""

    @property
    def cells(self) -> list[str]:
        return [numbers.MISSING if value is None else self.metric.format(value) for value in self.values]


def models(rows: Rows) -> dict[str, str]:
    """The models there are numbers of, in the order of the table, with the names people read."""
    known = {key: name for key, name in MODEL_NAMES.items() if key in rows}
    return known | {key: key for key in rows if key not in known}


def lines(rows: Rows) -> list[Line]:
    """The table line by line; numbers without a metric of their own come last, by their names."""
    known = {metric.key for metric in METRICS}
    others = dict.fromkeys(key for row in rows.values() for key in row if key not in known)
    extra = [Metric(key, "Other", key.replace("_", " "), numbers.plain, "") for key in others]
    table = []
    for metric in (*METRICS, *extra):
        values = tuple(value_of(rows[key], metric.key) for key in models(rows))
        if any(value is not None for value in values):
            table.append(Line(metric, values, _kept(rows, metric.key)))
    return table


def value_of(row: Mapping[str, float], key: str) -> float | None:
    """A model's number if it has it and it is finite; memory is added up from its parts where it is not given."""
    if key == "memory_bytes" and key not in row:
        weights, kv = value_of(row, "weight_bytes"), value_of(row, "kv_bytes")
        return None if weights is None or kv is None else weights + kv
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def child_over_parent(rows: Rows, key: str) -> float | None:
    """The child's value divided by the parent's, None where one is missing or the parent's is 0."""
    child, parent = (value_of(rows.get(model, {}), key) for model in ("child", "parent"))
    return child / parent if child is not None and parent else None


def _kept(rows: Rows, key: str) -> str:
    quotient = child_over_parent(rows, key)
    return numbers.MISSING if quotient is None else numbers.ratio(quotient)


def final_table(rows: Rows) -> Table:
    """The result table for a terminal: the lines and columns of the page's."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in (*models(rows).values(), "child / parent"):
        table.add_column(name, justify="right")
    group = ""
    for line in lines(rows):
        if group and line.metric.group != group:
            table.add_row()
        group = line.metric.group
        table.add_row(line.metric.label, *line.cells, line.kept)
    return table


def summary(target: str, rows: Rows) -> dict[str, Any]:
    """The numbers for programs, as JSON can hold them: `{"target": .., "rows": {model: {name: number or None}}}`."""
    plain = {model: {key: value_of(row, key) for key in row} for model, row in rows.items()}
    return {"target": target, "rows": plain}
