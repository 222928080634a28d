"""Figures of what was measured: predictions put to the test, training, time."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from puzzle.artefacts import LibraryRow
from puzzle.report import numbers, theme
from puzzle.report.data import MODEL_NAMES, Checks, Curve, ReportData, Rows
from puzzle.report.table import value_of
from puzzle.variants import GatedFFN, GroupedQuery, Subblock, Variant, parse_variant

QUANTITIES = {"tok_s": "throughput, tok/s", "prefill_ms": "prefill, ms", "decode_ms": "decode step, ms"}
TIMES = ("prefill_ms", "decode_ms")
"""In the order of `Timed`."""
_CHECKED = {"parent": "parent", "child": "child", "blend": "every second layer of the child, else the parent"}
CURVES = {"loss": "GKD loss", "validation_kl": "validation KL, nats per token"}
_MAX_POINTS = 400
"""Of a curve; the page has no more pixels for it, and data stays aggregated."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star")


def predicted_measured(rows: Rows, quantity: str, checks: Checks = ()) -> go.Figure | None:
    """One speed of each model, the cost tables' prediction against the whole model on the engine; None without both.

    Args:
        checks: what each search timed; shown where the quantity is a time.
    """
    points = {}
    # The child before GKD has the child's architecture, so nothing of its own to predict.
    for model in ("parent", "child", "uniform"):
        row = rows.get(model, {})
        predicted, measured = value_of(row, f"predicted_{quantity}"), value_of(row, f"measured_{quantity}")
        if predicted is not None and measured:
            points[model] = (predicted, measured)
    if not points:
        return None
    timed = _checked(checks, quantity)
    limit = 1.15 * max(max(point) for point in (*points.values(), *timed.values()))
    diagonal = go.Scatter(
        x=[0, limit],
        y=[0, limit],
        mode="lines",
        line={"color": theme.LINE, "dash": "dot", "width": 1.5},
        showlegend=False,
        hoverinfo="skip",
    )
    traces = [_dot(model, *point) for model, point in points.items()]
    return theme.figure(
        300,
        [diagonal, *([_circles(timed)] if timed else []), *traces],
        xaxis_title_text=f"predicted {QUANTITIES[quantity]}",
        yaxis_title_text=f"measured {QUANTITIES[quantity]}",
        xaxis_range=[0, limit],
        yaxis_range=[0, limit],
        xaxis_nticks=5,
        yaxis_nticks=5,
        # Points lie near the diagonal, which leaves the upper left corner free.
        legend={"orientation": "v", "x": 0.02, "y": 0.98, "yanchor": "top"},
    )


def errors(checks: Checks) -> list[float]:
    """Of all predictions of times that were put to the test, without sign."""
    return [error for check in checks for model in check.values() for error in model.errors]


def _checked(checks: Checks, quantity: str) -> dict[str, tuple[float, float]]:
    """Predicted and measured by what a person calls the model."""
    if quantity not in TIMES:
        return {}
    index = TIMES.index(quantity)
    return {
        f"after search {number}: {_CHECKED[name]}": (model.predicted[index], model.measured[index])
        for number, check in enumerate(checks, 1)
        for name, model in check.items()
    }


def _circles(points: Mapping[str, tuple[float, float]]) -> go.Scatter:
    predicted, measured = zip(*points.values(), strict=True)
    return go.Scatter(
        x=predicted,
        y=measured,
        text=[*points],
        name="before building",
        mode="markers",
        marker={"size": 7, "color": theme.LINE, "symbol": "circle-open", "line": {"width": 1.5}},
        legendrank=2000,
        hovertemplate="%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>",
        showlegend=True,
    )


def _dot(model: str, predicted: float, measured: float) -> go.Scatter:
    return go.Scatter(
        x=[predicted],
        y=[measured],
        name=f"{model} {numbers.signed_percent(predicted / measured - 1)}",
        mode="markers",
        marker={"size": 11, "color": theme.MODEL_COLOURS[model], "symbol": theme.MODEL_SYMBOLS[model]},
        hovertemplate=f"{model}<br>predicted %{{x:.4g}}<br>measured %{{y:.4g}}<extra></extra>",
        showlegend=True,
    )


def local_distillation(data: ReportData, subblock: Subblock) -> go.Figure | None:
    """Held-out loss of each variant by layer, before (dotted) and after (solid) blockwise local distillation."""
    by_variant: dict[str, list[LibraryRow]] = {}
    for row in sorted(data.library.rows, key=lambda row: row.layer):
        if row.subblock == subblock:
            by_variant.setdefault(row.variant, []).append(row)
    names = sorted(by_variant, key=lambda name: _size_order(parse_variant(subblock, name)))
    if not names:
        return None
    sized = [name for name in names if name not in ("linear", "none")]
    # A scale has two ends at least, even for one size.
    colours = dict(zip(sized, sample_colorscale(theme.SIZES, max(2, len(sized))), strict=False))
    colours |= {"linear": theme.LINEAR, "none": theme.LINE}
    traces = []
    for index, name in enumerate(names):
        traces += _before_after(name, by_variant[name], colours[name], _SYMBOLS[index % len(_SYMBOLS)])
    return theme.figure(
        380,
        traces,
        xaxis=theme.layer_axis(data.scores.num_layers),
        yaxis_title_text="held-out loss",
        yaxis=theme.log_axis(
            [loss for row in data.library.rows if row.subblock == subblock for loss in (row.loss, row.initial_loss)]
        ),
        legend={"y": -0.22, "yanchor": "top"},
    )


def _size_order(variant: Variant) -> tuple[float, str]:
    if isinstance(variant, GroupedQuery):
        return -variant.num_kv_heads, variant.name
    return -variant.intermediate_size if isinstance(variant, GatedFFN) else 0, variant.name


def _before_after(name: str, rows: Sequence[LibraryRow], colour: str, symbol: str) -> list[Any]:
    layers = [row.layer for row in rows]
    common = {"x": layers, "legendgroup": name}
    after = go.Scatter(
        **common,
        y=[_digits(row.loss) for row in rows],
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 1.8},
        marker={"size": 5, "symbol": symbol},
        customdata=[_digits(row.initial_loss) for row in rows],
        hovertemplate=f"layer %{{x}}, {name}<br>before %{{customdata:.3g}}, after %{{y:.3g}}<extra></extra>",
        showlegend=True,
    )
    if all(row.trained_tokens == 0 for row in rows):
        return [after]
    before = go.Scatter(
        **common,
        y=[_digits(row.initial_loss) for row in rows],
        mode="lines",
        line={"color": colour, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    return [before, after]


def training(curves: Mapping[str, Curve], quantity: str) -> go.Figure | None:
    """One quantity during GKD against the tokens seen, a line a model."""
    traces = []
    for model, curve in curves.items():
        points = _thinned([(point["tokens"], point[quantity]) for point in curve if quantity in point])
        if points:
            x, y = zip(*points, strict=True)
            colour = theme.MODEL_COLOURS.get(model, theme.LINE)
            name = MODEL_NAMES.get(model, model)
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    name=name,
                    mode="lines+markers" if len(points) <= 30 else "lines",
                    line={"color": colour, "width": 2, "dash": "solid" if model == "child" else "dash"},
                    marker={"size": 6, "symbol": theme.MODEL_SYMBOLS.get(model, "circle")},
                    hovertemplate="%{x:.4s} tokens<br>%{y:.4g}",
                    showlegend=True,
                )
            )
    if not traces:
        return None
    return theme.figure(
        320, traces, xaxis_title_text="tokens", xaxis_nticks=6, yaxis_title_text=CURVES[quantity], margin_t=36
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points where there are more than can be seen."""
    step = -(-len(points) // _MAX_POINTS)
    groups = (points[start : start + step] for start in range(0, len(points), max(step, 1)))
    return [(sum(x for x, _ in group) / len(group), _digits(sum(y for _, y in group) / len(group))) for group in groups]


def _digits(value: float) -> float:
    """Four significant digits, more than a figure shows; keeps the page small."""
    return float(f"{value:.4g}")


def stage_seconds(seconds: Mapping[str, float]) -> go.Figure:
    """How long each stage took, in the order in which they ran."""
    bars = go.Bar(
        x=[*seconds.values()],
        y=[*seconds],
        orientation="h",
        marker_color=theme.FFN,
        text=[numbers.duration(value) for value in seconds.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    return theme.figure(
        26 * len(seconds) + 24,
        [bars],
        margin={"l": 8, "r": 12, "t": 4, "b": 4},
        bargap=0.3,
        showlegend=False,
        xaxis_visible=False,
        xaxis_range=[0, 1.35 * max(seconds.values()) or 1],
        yaxis_autorange="reversed",
        yaxis_showgrid=False,
    )
