"""The four figures: architecture, scores, frontier, and the curve of GKD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from puzzle.artefacts import ScoreTable, Solution
from puzzle.quantities import QUANTITIES
from puzzle.units import format_number, format_ratio
from puzzle.variants import SUBBLOCKS, Architecture, BlockVariant, Variant

COLOURS = {"attention": "#6fc7b7", "ffn": "#93abef", "other": "#f2c14e"}
_MODELS = {"parent": ("#6b7280", "circle"), "child": ("#1d6fc4", "diamond"), "uniform": ("#d9660f", "triangle-up")}
_LABELS = {"attention": "attention", "ffn": "FFN"}
_INK, _SOFT, _RULE, _GHOST, _CLEAR = "#1b212a", "#58616e", "#e3e6ea", "#dde1e6", "rgba(0, 0, 0, 0)"
_HEAT = [[0, "#f4f8fd"], [0.25, "#c3dcf1"], [0.5, "#74add8"], [0.75, "#2a6fb0"], [1, "#08264f"]]
_SLAB = 0.15
"""Height of a variant that is something else than a smaller form of the parent's."""
_FLOOR = 1e-6
"""Least KL with a colour of its own, nats per token; the parent's own blocks have a KL of 0."""


def _figure(height: int, traces: Sequence[Any], **layout: Any) -> go.Figure:
    """A figure as wide as its place on the page."""
    axis = {"ticks": "", "zeroline": False, "gridcolor": _RULE, "title_font_color": _SOFT, "automargin": True}
    base = go.Layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 8, "r": 12, "t": 28, "b": 46},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": _INK},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": _SOFT, "font_color": _INK},
        hovermode="closest",
        xaxis=axis,
        yaxis=axis | {"title_standoff": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return go.Figure(traces, base).update_layout(**layout)


def _layer_axis(count: int) -> dict[str, Any]:
    return {"title_text": "layer", "showgrid": False, "range": [-0.5, count - 0.5], "dtick": 1 if count <= 16 else None}


def _share(variant: Variant, own: Variant) -> float | None:
    """Its size relative to the parent variant's; None: another kind takes its place."""
    if variant.absent:
        return 0.0
    return (variant.size or 1) / (own.size or 1) if variant.kind == own.kind else None


def architecture(solution: Solution, parent: Sequence[str]) -> go.Figure:
    """One column a layer: attention above the line, FFN below, each as tall as its share of the parent's size."""
    blocks, parents = (Architecture.parse(names).blocks for names in (solution.blocks, parent))
    layers, traces = [*range(len(blocks))], []
    for sign, which in zip((1, -1), SUBBLOCKS, strict=True):
        pairs = [(block.subblock(which), own.subblock(which)) for block, own in zip(blocks, parents, strict=True)]
        shares, full = [_share(*pair) for pair in pairs], [sign] * len(layers)
        colours = [COLOURS["other" if share is None else which] for share in shares]
        hover = [
            f"layer {layer}, {_LABELS[which]}<br><b>{variant}</b><br>parent: {own}"
            for layer, (variant, own) in enumerate(pairs)
        ]
        heights = [sign * (_SLAB if share is None else share) for share in shares]
        text = {"text": [variant.name for variant, _ in pairs], "textposition": "inside", "insidetextanchor": "end"}
        place = {"x": layers, "width": 0.92}  # plotly's own follows from the distances within a trace
        traces += [
            go.Bar(y=full, marker_color=_GHOST, hoverinfo="skip", **place),
            go.Bar(y=heights, marker_color=colours, hoverinfo="skip", **place),
            go.Bar(y=full, marker_color=_CLEAR, hovertext=hover, hoverinfo="text", **place, **text),
        ]
    sides = {"range": [-1.05, 1.05], "tickvals": [-0.5, 0.5], "ticktext": ["FFN", "attention"], "showgrid": False}
    layout = {"barmode": "overlay", "uniformtext": {"mode": "hide", "minsize": 9}, "showlegend": False}
    return _figure(300, traces, margin_t=8, xaxis=_layer_axis(len(layers)), yaxis=sides, **layout)


def scores(table: ScoreTable, solution: Solution) -> go.Figure:
    """Layers across, variants down: the KL with that subblock alone replaced, as colour; a dot on what was chosen."""
    blocks, parents = (Architecture.parse(names).blocks for names in (solution.blocks, table.parent_blocks))
    scored = {BlockVariant.parse(row.block) for row in table.rows}
    labels, z, hover, dots = list[str](), [], [], []
    for which in SUBBLOCKS:
        shown = {block.subblock(which) for block in scored}
        for variant in sorted(shown, key=lambda variant: (-(variant.size or 0), variant.name)):
            label = f"{_LABELS[which]} {variant.name}"
            names = [replace(own, **{which: variant}).name for own in parents]
            rows = [table.by_key.get((layer, name)) for layer, name in enumerate(names)]
            values = [(getattr(row, "kl", math.nan), getattr(row, "kl_se", math.nan)) for row in rows]
            labels.append(label)
            z.append([math.log10(max(kl, _FLOOR)) for kl, _ in values])
            texts = (f"KL {format_number(kl)} ± {format_number(error, 2)}" for kl, error in values)
            hover.append([f"layer {layer}, {label}<br>{text}" for layer, text in enumerate(texts)])
            dots.append(["●" * (block.subblock(which) == variant) for block in blocks])
    powers = [math.log10(row.kl) for row in table.rows if row.kl > _FLOOR] or [-6.0, 0.0]
    ticks = [*range(math.floor(min(powers)), math.ceil(max(powers)) + 1)]
    bar = {"orientation": "h", "y": 1, "yanchor": "bottom", "thickness": 8, "len": 1, "outlinewidth": 0}
    names = [f"{10.0**tick:g}" if tick > -4 else f"10<sup>{tick}</sup>" for tick in ticks]
    text = {"text": dots, "texttemplate": "%{text}", "hovertext": hover, "hoverinfo": "text"}
    heat = go.Heatmap(z=z, zmin=ticks[0], zmax=ticks[-1], colorscale=_HEAT, xgap=1, ygap=1, **text)
    heat.colorbar = bar | {"tickvals": ticks, "ticktext": names}
    down = {"autorange": "reversed", "tickvals": [*range(len(labels))], "ticktext": labels, "showgrid": False}
    return _figure(22 * len(labels) + 96, [heat], margin_t=44, xaxis=_layer_axis(table.num_layers), yaxis=down)


def frontier_figure(
    frontier: Sequence[Solution], marked: Mapping[str, Solution], quantity: str = "throughput_tok_s"
) -> go.Figure:
    """A quantity, as a multiple of the parent's, against the sum of scores; `marked` has `child`, `uniform` or both.

    What lies far above the line stands at the upper edge, with its score.
    """
    line = {"mode": "lines+markers", "line": {"color": _SOFT, "width": 1.5}, "marker_size": 5}
    traces = [go.Scatter(**line, **_points(frontier, quantity))]
    highest = max(point.score for point in frontier)
    verticals, top = {"parent": 1.0}, 1.5 * highest if highest > 0 else math.inf
    for model, solution in marked.items():
        marker = dict(zip(("color", "symbol"), _MODELS[model], strict=True), size=12)
        place = "bottom right" if model == "child" else "top right"
        above = f" at {format_number(solution.score)}" if solution.score > top else ""
        text = {"mode": "markers+text", "text": [f"<b>{model}</b>{above}"], "textposition": place}
        point = _points([solution], quantity) | {"y": [min(solution.score, top)]}
        traces.append(go.Scatter(marker=marker, **text, **point))
        if model == "child" and quantity in solution.asked:
            verticals["target"] = solution.asked[quantity] / solution.parent[quantity]
    multiples = [*verticals.values(), *(x for trace in traces for x in trace.x if math.isfinite(x))]
    margin = 0.06 * (max(multiples) - min(multiples)) or 0.1
    across = {"range": [min(multiples) - margin, max(multiples) + 2 * margin], "ticksuffix": "x", "tickformat": "~g"}
    dashed = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "line": {"color": _SOFT, "dash": "dash", "width": 1}}
    named = {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    return _figure(
        380,
        traces,
        showlegend=False,
        xaxis=across | {"title_text": f"predicted {QUANTITIES[quantity].label}, times the parent's"},
        yaxis={"rangemode": "tozero", "title_text": "sum of scores"},
        shapes=[dashed | {"x0": x, "x1": x} for x in verticals.values()],
        annotations=[named | {"text": name, "x": x} for name, x in verticals.items()],
    )


def _points(solutions: Sequence[Solution], quantity: str) -> dict[str, Any]:
    x = [QUANTITIES[quantity].known(each.predicted[quantity]) / each.parent[quantity] for each in solutions]
    hover = [
        f"{QUANTITIES[quantity].text(solution.predicted[quantity])}, {format_ratio(multiple)}"
        f"<br>score {format_number(solution.score, 4)}, batch {solution.batch_size}"
        for solution, multiple in zip(solutions, x, strict=True)
    ]
    return {"x": x, "y": [solution.score for solution in solutions], "hovertext": hover, "hoverinfo": "text"}


def training(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> go.Figure:
    """Validation KL during GKD against the tokens seen, a line a model."""
    traces = []
    for model, curve in curves.items():
        points = [(point["tokens"], point["validation_kl"]) for point in curve if "validation_kl" in point]
        x, y = zip(*points, strict=True)
        colour, symbol = _MODELS[model]
        looks = {"mode": "lines+markers", "line_color": colour, "marker": {"symbol": symbol, "size": 8}}
        traces.append(go.Scatter(x=x, y=y, name=model, hovertemplate="%{x:.4s} tokens, KL %{y:.4g}", **looks))
    axes = {"xaxis_title_text": "tokens", "yaxis_title_text": "validation KL, nats per token"}
    return _figure(280, traces, showlegend=True, yaxis_rangemode="tozero", **axes)
