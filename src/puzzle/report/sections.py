"""The sections of the page, each with a line that says what to look at. A section without data is left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puzzle.artefacts import WORTH
from puzzle.report import choice, correction, evidence
from puzzle.report.data import ReportData


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure and the id of its place on the page."""

    anchor: str
    figure: Any
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page. `caption` is HTML written here, never a person's text."""

    anchor: str
    heading: str
    caption: str
    plots: Sequence[Plot]
    columns: bool = False
    """Whether the figures stand side by side where the page is wide enough."""


def sections(data: ReportData) -> list[Section]:
    """In the order of reading."""
    everything = (
        _architecture(data),
        _scores(data),
        _frontier(data),
        _correction(data),
        _prediction(data),
        _library(data),
        _training(data),
        _time(data),
    )
    return [section for section in everything if section.plots]


def _architecture(data: ReportData) -> Section:
    child = Plot(anchor="architecture-child", figure=choice.architecture(data, data.solution, height=330))
    plots = [child]
    if data.uniform is not None:
        figure = choice.architecture(data, data.uniform, height=210)
        plots.append(Plot(anchor="architecture-uniform", figure=figure, title="The uniform child, for comparison"))
    return Section(
        anchor="architecture",
        heading="Architecture",
        caption="One column a layer, the first on the left. Full height is the parent's size, pale is what was removed."
        '<br><span class="key"><i class="attention"></i>KV heads kept</span> '
        '<span class="key"><i class="ffn"></i>FFN width kept</span> '
        '<span class="key"><i class="linear"></i>replaced by a linear map</span> '
        '<span class="key"><b>&times;</b> left out</span>',
        plots=plots,
    )


def _scores(data: ReportData) -> Section:
    return Section(
        anchor="scores",
        heading="Scores",
        caption="KL to the parent with one block replaced, nats per token: pale is harmless, dark is costly. Dark "
        "columns are the layers that the model needs most. Rows are blocks, attention + FFN, from the parent's size "
        "down."
        '<br><span class="key"><i class="outline"></i>chosen</span> '
        '<span class="key"><b>&times;</b> score not finite, cannot be chosen</span>',
        plots=[Plot(anchor="scores-map", figure=choice.heat_map(data))],
    )


def _frontier(data: ReportData) -> Section:
    plot = [Plot(anchor="frontier-plot", figure=choice.frontier(data))] if data.frontier else []
    return Section(
        anchor="frontier",
        heading="Quality against speed",
        caption="Each point of the line is the best architecture at its predicted throughput. Lower is closer to the "
        "parent, which scores 0. The height of the uniform child above the line is what it gives up.",
        plots=plot,
    )


def _correction(data: ReportData) -> Section:
    agreement, plots = "", []
    if found := data.correction:
        agreement = correction.agreement(found)
        plots = [
            Plot(anchor="correction-whole", figure=correction.predicted_whole(found)),
            Plot(anchor="correction-gains", figure=correction.gains(found), title="The best after each step"),
        ]
    return Section(
        anchor="correction",
        heading="Whole architectures",
        caption="Blocks interact, so sums of their scores are not what a whole architecture is worth. Every point is "
        "an architecture within the target, before GKD, on scoring text; the outlined one is the best. It takes "
        f"the place of the search's own if it is better by {100 * WORTH:.0f} %: less may be gone on other text. "
        f"In brackets: architectures that a step had to evaluate. {agreement}",
        plots=plots,
    )


def _prediction(data: ReportData) -> Section:
    figures = {
        quantity: evidence.predicted_measured(data.rows, quantity, data.checks) for quantity in evidence.QUANTITIES
    }
    before = ""
    if errors := evidence.errors(data.checks):
        mean, worst = 100 * sum(errors) / len(errors), 100 * max(errors)
        before = (
            " Circles: parent, child and a blend of both, timed after each search, before anything was built. There, "
            f"times were off by {mean:.1f} % on average and {worst:.1f} % at worst, and where that was more than noise "
            "the tables were fitted to them for the next search."
        )
    return Section(
        anchor="prediction",
        heading="Predicted against measured",
        caption="On the dotted line the cost tables were right. The error is predicted / measured - 1. Throughput "
        f"counts generated tokens.{before}",
        plots=[Plot(anchor=f"prediction-{name}", figure=figure) for name, figure in figures.items() if figure],
        columns=True,
    )


def _library(data: ReportData) -> Section:
    subblocks = {"attention": "Attention", "ffn": "FFN"}
    figures = {subblock: evidence.local_distillation(data, subblock) for subblock in ("attention", "ffn")}
    return Section(
        anchor="library",
        heading="Blockwise local distillation",
        caption="Held-out loss of each variant, by layer: dotted at the start, solid after training; 1 is as bad as no "
        "output at all. The loss is the squared error over the squared output of the parent's subblock layer.",
        plots=[
            Plot(anchor=f"library-{subblock}", figure=figure, title=subblocks[subblock])
            for subblock, figure in figures.items()
            if figure
        ],
        columns=True,
    )


def _training(data: ReportData) -> Section:
    figures = {quantity: evidence.training(data.curves, quantity) for quantity in evidence.CURVES}
    return Section(
        anchor="training",
        heading="Global knowledge distillation",
        caption="Child and uniform child learn from the parent on the same tokens. Lower is closer to the parent.",
        plots=[Plot(anchor=f"training-{name}", figure=figure) for name, figure in figures.items() if figure],
        columns=True,
    )


def _time(data: ReportData) -> Section:
    plots = [Plot(anchor="time-plot", figure=evidence.stage_seconds(data.seconds))] if data.seconds else []
    return Section(anchor="time", heading="Time", caption="Wall time of each stage.", plots=plots)
