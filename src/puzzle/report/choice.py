"""Figures of what the search chose, and what it chose from."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from puzzle.artefacts import CostRow, Solution
from puzzle.quantities import QUANTITIES
from puzzle.report import numbers, theme
from puzzle.report.data import ReportData
from puzzle.variants import BlockVariant, GatedFFN, GroupedQuery, Subblock, Variant

_SLAB = 0.15
"""Height of the mark for a linear map, of full or low rank, which has neither KV heads nor a width."""
_FLOOR = 1e-6
"""Least KL with a colour of its own, nats per token; the parent's own blocks have a KL of 0."""


def architecture(data: ReportData, solution: Solution, *, height: int) -> go.Figure:
    """One column a layer: above the line the attention, below it the FFN, as shares of the parent's sizes."""
    chosen = [BlockVariant.parse(name) for name in solution.blocks]
    parents = [BlockVariant.parse(name) for name in data.parent_blocks]
    costs = {
        (row.layer, row.part, row.variant): row for row in data.costs.rows if row.batch_size == solution.batch_size
    }
    traces: list[Any] = []
    subblocks: tuple[tuple[Subblock, int, str], ...] = (("attention", 1, theme.ATTENTION), ("ffn", -1, theme.FFN))
    for subblock, sign, colour in subblocks:
        variants = [block.subblock(subblock) for block in chosen]
        hover = [
            _describe(layer, subblock, variant, parent.subblock(subblock), costs.get((layer, subblock, variant.name)))
            for layer, (variant, parent) in enumerate(zip(variants, parents, strict=True))
        ]
        shares = [_share(variant, parent.subblock(subblock)) for variant, parent in zip(variants, parents, strict=True)]
        traces += _half_traces(variants, shares, hover, sign, colour)
    return theme.figure(
        height,
        traces,
        barmode="overlay",
        bargap=0.12,
        xaxis=theme.layer_axis(len(chosen)),
        yaxis_range=[-1.22, 1.22],
        yaxis_tickvals=[-1, -0.5, 0.5, 1],
        yaxis_ticktext=["100 %", "50 %", "50 %", "100 %"],
        yaxis_zeroline=True,
        showlegend=False,
        annotations=[_corner("attention: KV heads kept", 1.03, "bottom"), _corner("FFN: width kept", -1.03, "top")],
    )


def _half_traces(
    variants: Sequence[Variant], shares: Sequence[float], hover: Sequence[str], sign: int, colour: str
) -> list[Any]:
    """The parent's size as a pale column, on it what is left of it."""
    layers = range(len(variants))
    sized = [layer for layer in layers if isinstance(variants[layer], GroupedQuery | GatedFFN)]
    linear = [layer for layer in layers if layer not in sized and variants[layer].kind != "none"]
    none = [layer for layer in layers if variants[layer].kind == "none"]
    pattern = {"shape": "/", "bgcolor": theme.LINEAR, "fgcolor": "#ffffff", "size": 5, "solidity": 0.3}
    return [
        go.Bar(x=[*layers], y=[sign] * len(layers), marker_color=theme.GHOST, hovertext=hover, hoverinfo="text"),
        go.Bar(x=sized, y=[sign * shares[layer] for layer in sized], marker_color=colour, hoverinfo="skip"),
        go.Bar(
            x=linear,
            y=[sign * _SLAB] * len(linear),
            marker_pattern=pattern,
            hoverinfo="skip",
        ),
        go.Scatter(
            x=none,
            y=[sign * _SLAB] * len(none),
            mode="markers",
            marker={"symbol": "x-thin", "size": 6, "line": {"width": 1.5, "color": theme.LINE}},
            hoverinfo="skip",
        ),
    ]


def _share(variant: Variant, parent: Variant) -> float:
    if isinstance(variant, GroupedQuery) and isinstance(parent, GroupedQuery):
        return variant.num_kv_heads / parent.num_kv_heads  # a window is told by the text beside it
    if isinstance(variant, GatedFFN) and isinstance(parent, GatedFFN):
        return variant.intermediate_size / parent.intermediate_size
    return 1.0 if variant == parent else 0.0


def _describe(layer: int, subblock: str, variant: Variant, parent: Variant, cost: CostRow | None) -> str:
    text = f"<b>layer {layer}, {subblock}: {variant}</b> (parent {parent})"
    if cost is None:
        return text
    kv = f", {numbers.size(cost.kv_bytes_per_sequence)} of KV cache per sequence" if subblock == "attention" else ""
    return (
        f"{text}<br>{numbers.count(cost.params)} parameters{kv}<br>"
        f"prefill {numbers.milliseconds(cost.prefill_ms)}, decode {numbers.milliseconds(cost.decode_ms)}"
    )


def _corner(text: str, y: float, anchor: str) -> dict[str, Any]:
    return {
        "text": text,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": y,
        "yanchor": anchor,
        "showarrow": False,
    }


def heat_map(data: ReportData) -> go.Figure:
    """Layers across, blocks down, the KL of each replacement as colour; what was chosen is outlined."""
    blocks = sorted({row.block for row in data.scores.rows}, key=_size_order)
    row_px = max(12, min(22, 620 // len(blocks)))
    return theme.figure(
        row_px * len(blocks) + 90,
        [_heat(data, blocks), *_missing(data, blocks), _outlines(data.solution.blocks, blocks)],
        showlegend=False,
        xaxis=theme.layer_axis(data.scores.num_layers, room=0),
        yaxis_range=[len(blocks) - 0.5, -0.5],
        yaxis_showgrid=False,
        yaxis_tickvals=[*range(len(blocks))],
        yaxis_ticktext=blocks,
        yaxis_tickfont_size=10 if row_px < 15 else 12,
        shapes=_group_lines(blocks),
    )


def _size_order(block: str) -> tuple[object, ...]:
    """The largest first: by attention, then by FFN; then the kinds without sizes."""
    parsed = BlockVariant.parse(block)
    attention, ffn = parsed.attention, parsed.ffn
    kv_heads = attention.num_kv_heads if isinstance(attention, GroupedQuery) else 0
    width = ffn.intermediate_size if isinstance(ffn, GatedFFN) else 0
    return -kv_heads, attention.name, -width, ffn.name


def _group_lines(blocks: Sequence[str]) -> list[dict[str, Any]]:
    """A line where the attention changes."""
    attention = [block.partition("+")[0] for block in blocks]
    borders = [y - 0.5 for y in range(1, len(blocks)) if attention[y] != attention[y - 1]]
    line = {"color": theme.LINE, "width": 1}
    return [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line} for y in borders]


def _heat(data: ReportData, blocks: Sequence[str]) -> go.Heatmap:
    rows = {(row.layer, row.block): row for row in data.scores.rows}
    table = [[rows.get((layer, block)) for layer in range(data.scores.num_layers)] for block in blocks]
    positive = [row.kl for row in data.scores.rows if row.kl > _FLOOR]
    low, high = (math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))) if positive else (-6, 0)
    ticks = [*range(low, max(high, low + 1) + 1)]
    return go.Heatmap(
        z=[[None if row is None else round(math.log10(max(row.kl, _FLOOR)), 3) for row in line] for line in table],
        customdata=[[None if row is None else [f"{row.kl:.3g}", f"{row.kl_se:.2g}"] for row in line] for line in table],
        text=[[block] * data.scores.num_layers for block in blocks],
        zmin=ticks[0],
        zmax=ticks[-1],
        colorscale=theme.HEAT,
        xgap=0.5,
        ygap=0.5,
        hovertemplate="layer %{x}, <b>%{text}</b><br>KL %{customdata[0]} &#177; %{customdata[1]}<extra></extra>",
        colorbar={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "len": 1,
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": ticks,
            "ticktext": [f"{10.0**tick:g}" if tick > -4 else f"10<sup>{tick}</sup>" for tick in ticks],
        },
    )


def _missing(data: ReportData, blocks: Sequence[str]) -> list[go.Scatter]:
    """Crosses where a block that the layer may have has no score; nothing where it may not have it."""
    there = {(row.layer, row.block) for row in data.scores.rows}
    able = {(row.layer, row.part, row.variant) for row in data.costs.rows}
    gaps = []
    for layer in range(data.scores.num_layers):
        for y, block in enumerate(blocks):
            attention, _, ffn = block.partition("+")
            possible = (layer, "attention", attention) in able and (layer, "ffn", ffn) in able
            if possible and (layer, block) not in there:
                gaps.append((layer, y))
    if not gaps:
        return []
    marker = {"symbol": "x-thin", "size": 5, "line": {"width": 1, "color": theme.LINE}}
    x, y_values = zip(*gaps, strict=True)
    return [go.Scatter(x=x, y=y_values, mode="markers", marker=marker, hoverinfo="skip")]


def _outlines(chosen: Sequence[str], blocks: Sequence[str]) -> go.Scatter:
    """One rectangle for each run of neighbouring layers with the same block, in one trace."""
    row_of = {block: y for y, block in enumerate(blocks)}
    x: list[float | None] = []
    y: list[float | None] = []
    for block, run in groupby(range(len(chosen)), key=lambda layer: chosen[layer]):
        layers = [*run]
        left, right, top, bottom = layers[0] - 0.5, layers[-1] + 0.5, row_of[block] - 0.5, row_of[block] + 0.5
        x += [left, right, right, left, left, None]
        y += [top, top, bottom, bottom, top, None]
    return go.Scatter(x=x, y=y, mode="lines", line={"color": theme.OUTLINE, "width": 2}, hoverinfo="skip")


def frontier(data: ReportData) -> go.Figure:
    """Predicted throughput against the sum of scores: the exact frontier, the child, the uniform child, the target."""
    marked = {"child": data.solution} | ({"uniform": data.uniform} if data.uniform else {})
    return frontier_figure(data.frontier, marked)


def frontier_figure(
    frontier: Sequence[Solution], marked: Mapping[str, Solution], quantity: str = "throughput_tok_s"
) -> go.Figure:
    """A quantity of `Totals` against the sum of scores.

    Args:
        marked: further solutions, by the names of `theme.MODEL_COLOURS`.
    """
    points = sorted(frontier, key=lambda point: point.predicted[quantity])
    places = {"child": "bottom right", "uniform": "top right"}
    traces = [
        go.Scatter(
            x=[_multiple(point, quantity) for point in points],
            y=[point.score for point in points],
            mode="lines+markers",
            line={"color": theme.LINE, "width": 1.5},
            marker={"size": 5},
            hovertext=[_point(point, quantity) for point in points],
            hoverinfo="text",
        )
    ]
    for model, solution in marked.items():
        traces.append(
            go.Scatter(
                x=[_multiple(solution, quantity)],
                y=[solution.score],
                mode="markers+text",
                text=[f"<b>{model}</b>"],
                textposition=places[model],
                marker={"size": 12, "color": theme.MODEL_COLOURS[model], "symbol": theme.MODEL_SYMBOLS[model]},
                hovertext=[_point(solution, quantity)],
                hoverinfo="text",
            )
        )
    everything = [*points, *marked.values()]
    multiples = [1.0, *(_multiple(point, quantity) for point in everything)]
    low, high = math.log10(min(multiples)), math.log10(max(multiples))
    margin = 0.12 * (high - low) or 0.1
    return theme.figure(
        400,
        traces,
        margin_t=26,
        showlegend=False,
        xaxis={
            "title": {"text": f"predicted {QUANTITIES[quantity].setting.replace('_', ' ')}, times the parent's"},
            "type": "log",
            "range": [low - margin, high + margin],
            "tickvals": (doublings := [2.0**power for power in range(-6, 12)]),
            "ticktext": [f"{multiple:g}x" for multiple in doublings],
        },
        yaxis_title_text="sum of scores",
        # The parent scores 0, which a logarithmic axis cannot show; a line marks its value instead.
        yaxis=theme.log_axis([point.score for point in everything])
        if all(solution.score > 0 for solution in marked.values())
        else {"rangemode": "tozero"},
        **_verticals(marked.get("child"), quantity),
    )


def _multiple(solution: Solution, quantity: str) -> float:
    return solution.predicted[quantity] / solution.parent[quantity]


def _point(solution: Solution, quantity: str) -> str:
    value = solution.predicted[quantity]
    written = numbers.tokens_per_second(value) if quantity == "throughput_tok_s" else numbers.plain(value)
    return (
        f"{written}, {numbers.ratio(_multiple(solution, quantity))}<br>"
        f"score {numbers.plain(solution.score)}, batch {solution.batch_size}"
    )


def _verticals(child: Solution | None, quantity: str) -> dict[str, Any]:
    lines = [("parent", 1.0, "right", theme.MODEL_COLOURS["parent"])]
    if child and (target := child.asked.get(quantity)):
        lines.append(("target", target / child.parent[quantity], "left", theme.OUTLINE))
    shapes = [
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": colour, "dash": "dash"}}
        for _, x, _, colour in lines
    ]
    annotations = [
        # On a logarithmic axis plotly wants the exponents of annotations, but the values of shapes.
        {
            "text": text,
            "x": math.log10(x),
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "xanchor": anchor,
            "showarrow": False,
        }
        for text, x, anchor, _ in lines
    ]
    return {"shapes": shapes, "annotations": annotations}
