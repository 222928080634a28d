"""How figures look: a palette that colour-blind people can tell apart, on light and on dark ground."""

from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
MODEL_COLOURS = {"parent": "#868e9c", "child_before": "#7fb2e5", "child": "#2b7fd0", "uniform": "#e0761b"}
MODEL_SYMBOLS = {"parent": "circle", "child_before": "diamond-open", "child": "diamond", "uniform": "triangle-up"}
ATTENTION, FFN, LINEAR = "#159a86", "#5b76d6", "#e0a100"
GHOST = "rgba(134, 142, 156, 0.20)"
LINE = "rgba(134, 142, 156, 0.9)"
OUTLINE = "#e8590c"
SIZES = ["#3b5bdb", "#1797ad", "#6ab04a"]
"""From the largest variant to the smallest."""
HEAT = [[0, "#eef5fc"], [0.25, "#c3dcf1"], [0.5, "#74add8"], [0.75, "#2a6fb0"], [1, "#08264f"]]
"""One hue from light (harmless) to dark (costly), so that the orange outlines stand out everywhere."""


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis, labelled at powers of ten, also at 2 and 5 times these, or wherever it suits: as far as it
    goes.
    """
    positive = [value for value in values if value > 0] or [1.0]
    span = max(positive) / min(positive)
    return {"type": "log", "tickformat": "~g", "dtick": 1 if span >= 100 else "D2" if span >= 5 else None}


def layer_axis(num_layers: int, room: float = 0.1) -> dict[str, Any]:
    """Columns of width 1 with `room` at both ends, and no labels between layers."""
    dtick = 1 if num_layers <= 12 else None
    return {
        "title": {"text": "layer"},
        "showgrid": False,
        "range": [-0.5 - room, num_layers - 0.5 + room],
        "dtick": dtick,
    }


def figure(height: int, traces: list[Any], **layout: Any) -> go.Figure:
    """A figure as wide as its place on the page. Colours of text and grid follow the page's style sheet."""
    axis = {"showline": False, "zeroline": False, "ticks": ""}
    base = go.Layout(
        template=go.layout.Template(),
        height=height,
        autosize=True,
        margin={"l": 8, "r": 12, "t": 12, "b": 46},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": FONT, "size": 12},
        hoverlabel={"bgcolor": "#1f2630", "bordercolor": "#1f2630", "font": {"color": "#ffffff", "family": FONT}},
        hovermode="closest",
        xaxis=axis,
        yaxis=axis | {"automargin": True, "title": {"standoff": 8}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0, 0, 0, 0)"},
    )
    return go.Figure(traces, base).update_layout(**layout)
