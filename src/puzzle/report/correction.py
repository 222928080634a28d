"""Figures of the correction: sums of scores put to the test on whole architectures, and what each step gained."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from puzzle.artefacts import Correction, Judged
from puzzle.report import numbers, theme

STEPS = {
    "search": ("the search's own", "diamond", theme.MODEL_COLOURS["child_before"]),
    "pool": ("its next best", "circle", theme.LINE),
    "depth": ("layers removed first", "square", theme.LINEAR),
    "rounds": ("scored again around the best", "triangle-up", theme.ATTENTION),
    "pairs": ("with pairs measured", "star", theme.FFN),
}
"""Of each step, its name for people, its symbol and its colour."""
VALUES = {"kl": "KL to the parent, nats per token", "lm_loss": "LM loss, nats per token", "cosine": "cosine distance"}


def agreement(correction: Correction) -> str:
    """A sentence on the order of sums and of wholes over the search's best solutions; empty without several."""
    if correction.tau is None or correction.spearman is None:
        return ""
    return (
        "Over the search's best solutions, the order of the sums agrees with the order of the wholes by Kendall's tau "
        f"{correction.tau:.2f} (Spearman {correction.spearman:.2f}); 1 is the same order, 0 is none."
    )


def predicted_whole(correction: Correction) -> go.Figure:
    """Every architecture within the bounds: the sum of its scores against its value as a whole; the best outlined."""
    best = min(correction.judged, key=lambda judged: judged.whole.value(correction.score))
    traces = []
    for step, (name, symbol, colour) in STEPS.items():
        points = [judged for judged in correction.judged if judged.step == step]
        if points:
            traces.append(_dots(correction, points, name, symbol, colour, best))
    return theme.figure(
        360,
        traces,
        xaxis_title_text="sum of scores",
        xaxis_nticks=6,
        yaxis_title_text=VALUES[_measured(correction)],
        legend={"y": -0.2, "yanchor": "top"},
    )


def _dots(
    correction: Correction, points: Sequence[Judged], name: str, symbol: str, colour: str, best: Judged
) -> go.Scatter:
    outlines = [theme.OUTLINE if judged is best else colour for judged in points]
    return go.Scatter(
        x=[judged.predicted for judged in points],
        y=[judged.whole.value(correction.score) for judged in points],
        name=name,
        mode="markers",
        marker={
            "size": [12 if judged is best else 8 for judged in points],
            "symbol": symbol,
            "color": colour,
            "line": {"width": [2.5 if judged is best else 0 for judged in points], "color": outlines},
        },
        hovertext=[_hover(judged) for judged in points],
        hoverinfo="text",
        showlegend=True,
    )


def _hover(judged: Judged) -> str:
    whole = judged.whole
    return (
        f"sum of scores {numbers.plain(judged.predicted)}<br>KL {numbers.significant(whole.kl)} &#177; "
        f"{numbers.significant(whole.kl_se, 2)}, loss {numbers.plain(whole.lm_loss)}<br>"
        f"top-1 agreement {numbers.percent(whole.top1_agreement)}"
    )


def gains(correction: Correction) -> go.Figure:
    """The best value after each step, with how many whole architectures it took."""
    values = [correction.judged[0].whole.value(correction.score), *(step.after for step in correction.steps)]
    labels = ["search", *(f"{step.name} ({step.evaluated:,})" for step in correction.steps)]
    bars = go.Bar(
        x=values,
        y=labels,
        orientation="h",
        marker_color=theme.FFN,
        text=[_gain(values, index) for index in range(len(values))],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )
    layout: dict[str, Any] = {"margin": {"l": 8, "r": 12, "t": 4, "b": 46}, "bargap": 0.3, "showlegend": False}
    return theme.figure(
        34 * len(values) + 60,
        [bars],
        xaxis_title_text=VALUES[_measured(correction)],
        xaxis_range=[0, 1.35 * max(values)],
        xaxis_nticks=5,
        yaxis_autorange="reversed",
        yaxis_showgrid=False,
        **layout,
    )


def _gain(values: Sequence[float], index: int) -> str:
    value, text = values[index], numbers.significant(values[index])
    return text if index == 0 else f"{text} ({numbers.signed_percent(value / values[index - 1] - 1)})"


def _measured(correction: Correction) -> str:
    return "kl" if correction.score == "task" else correction.score
