"""What the figures show: the data behind them, not their looks."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from puzzle.artefacts import Bounds
from puzzle.costs import Timed
from puzzle.report import ReportData, choice, evidence, theme
from puzzle.report.sections import sections


@pytest.fixture(scope="module")
def data(make_data: Callable[..., ReportData]) -> ReportData:
    data = make_data(8)
    blocks = ("kv8+w512", "kv2+w256", "kv2+w256", "linear+w64", "none+linear", "none+none", "kv4+none", "kv8+w512")
    return replace(data, solution=replace(data.solution, blocks=blocks, score=data.scores.total(blocks)))


def test_architecture_shows_shares_linear_maps_and_gaps(data: ReportData) -> None:
    figure = choice.architecture(data, data.solution, height=300)
    _, attention, linear, none, _, ffn, ffn_linear, ffn_none = figure.data
    heights = dict(zip(attention.x, attention.y, strict=True))
    assert heights == {0: 1.0, 1: 0.25, 2: 0.25, 6: 0.5, 7: 1.0}
    widths = dict(zip(ffn.x, ffn.y, strict=True))
    assert widths == {0: -1.0, 1: -0.5, 2: -0.5, 3: -0.125, 7: -1.0}
    assert [*linear.x] == [3]
    assert [*ffn_linear.x] == [4]
    assert [*none.x] == [4, 5]
    assert [*ffn_none.x] == [5, 6]


def test_architecture_hover_names_the_choice_and_its_costs(data: ReportData) -> None:
    ghost = choice.architecture(data, data.solution, height=300).data[0]
    assert ghost.hovertext[1].startswith(
        "<b>layer 1, attention: kv2</b> (parent kv8)<br>600 k parameters, 2.05 kB of KV"
    )


def test_heat_map_has_every_score_and_marks_what_is_missing(data: ReportData) -> None:
    heat, crosses, _ = choice.heat_map(data).data
    blocks = [line[0] for line in heat.text]
    assert (len(heat.z), len(heat.z[0])) == (54, 8)
    assert (blocks[0], blocks[1], blocks[-1]) == ("kv8+w512", "kv8+w448", "none+none")
    row = data.scores.row(3, "kv2+w256")
    assert heat.z[blocks.index("kv2+w256")][3] == pytest.approx(math.log10(row.kl), abs=1e-3)
    assert heat.z[0][3] == -6  # the parent's own block: a KL of 0, at the end of the scale
    assert heat.z[-1][1] is None
    assert [*zip(crosses.x, crosses.y, strict=True)] == [(1, 53)]


def test_heat_map_has_no_crosses_without_gaps(data: ReportData) -> None:
    scores = replace(data.scores, rows=tuple(row for row in data.scores.rows if row.block != "none+none"))
    blocks = ("kv8+w512",) * 8
    whole = replace(data, scores=scores, solution=replace(data.solution, blocks=blocks))
    assert len(choice.heat_map(whole).data) == 2


def test_outlines_join_neighbours_with_the_same_block(data: ReportData) -> None:
    outline = choice.heat_map(data).data[-1]
    assert outline.x.count(None) == 7  # rectangles: layers 1 and 2 share one
    assert (outline.x[6], outline.x[7]) == (0.5, 2.5)


def test_frontier_marks_child_uniform_parent_and_target(data: ReportData) -> None:
    figure = choice.frontier(data)
    line, child, uniform = figure.data
    assert [*line.x] == sorted(line.x)
    assert len(line.x) == len(data.frontier)
    assert (child.y[0], uniform.y[0]) == (data.solution.score, data.uniform.score)
    asked = data.solution.asked["throughput_tok_s"] / data.solution.parent["throughput_tok_s"]
    assert {shape.x0 for shape in figure.layout.shapes} == {1.0, asked}
    assert figure.layout.yaxis.type == "log"


def test_frontier_of_the_parent_itself_has_a_linear_axis(data: ReportData) -> None:
    kept = replace(data.solution, score=0.0, asked=Bounds(memory_bytes=1e12))
    figure = choice.frontier(replace(data, solution=kept))
    assert figure.layout.yaxis.type != "log"
    assert len(figure.layout.shapes) == 1


def test_prediction_error_is_relative_to_the_measurement() -> None:
    rows = {
        "parent": {"predicted_tok_s": 90.0, "measured_tok_s": 100.0},
        "child": {"predicted_tok_s": 210.0, "measured_tok_s": 200.0},
        "uniform": {"predicted_tok_s": 1.0},
    }
    figure = evidence.predicted_measured(rows, "tok_s")
    assert [trace.name for trace in figure.data[1:]] == ["parent -10.0 %", "child +5.0 %"]
    assert evidence.predicted_measured(rows, "prefill_ms") is None


def test_what_each_search_timed_is_beside_the_final_models(data: ReportData) -> None:
    _, circles, *final = evidence.predicted_measured(data.rows, "decode_ms", data.checks).data
    assert len(final) == 3
    assert len(circles.x) == len(circles.y) == 6
    last = data.checks[1]["blend"]
    assert (circles.text[5], circles.x[5], circles.y[5]) == (
        "after search 2: every second layer of the child, else the parent", last.predicted[1], last.measured[1],
    )  # fmt: skip
    assert len(evidence.predicted_measured(data.rows, "tok_s", data.checks).data) == 4


def test_the_caption_says_how_far_off_they_were(data: ReportData) -> None:
    def caption(data: ReportData) -> str:
        return next(section.caption for section in sections(data) if section.anchor == "prediction")

    subblock = Timed(predicted=(1.0, 3.0), measured=(2.0, 2.0))
    assert "50.0 % on average and 50.0 % at worst" in caption(replace(data, checks=[{"child": subblock}]))
    assert "Circles" not in caption(replace(data, checks=[]))


def test_local_distillation_shows_before_and_after_from_large_to_small(data: ReportData) -> None:
    figure = evidence.local_distillation(data, "attention")
    assert [trace.name for trace in figure.data if trace.showlegend] == ["kv4", "kv2", "kv1", "linear", "none"]
    before, after = figure.data[:2]
    row = data.library.row(5, "attention", "kv4")
    assert (before.y[5], after.y[5]) == (pytest.approx(row.initial_loss, rel=1e-3), pytest.approx(row.loss, rel=1e-3))
    untrained = [trace for trace in figure.data if trace.legendgroup == "linear"]
    assert len(untrained) == 1


def test_a_library_with_one_size_has_its_figure(data: ReportData) -> None:
    rows = tuple(row for row in data.library.rows if row.subblock == "attention")
    one = [row for row in rows if row.variant == rows[0].variant]
    figure = evidence.local_distillation(replace(data, library=replace(data.library, rows=tuple(one))), "attention")
    assert figure is not None
    assert {trace.name for trace in figure.data if trace.name} == {rows[0].variant}


def test_library_without_rows_has_no_figure(data: ReportData) -> None:
    empty = replace(data, library=replace(data.library, rows=()))
    assert evidence.local_distillation(empty, "ffn") is None


def test_long_curves_are_averaged(data: ReportData) -> None:
    child = evidence.training(data.curves, "loss").data[0]
    losses = [point["loss"] for point in data.curves["child"]]
    assert len(losses) > 400 >= len(child.x) > 200
    assert sum(child.y) / len(child.y) == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    sparse = evidence.training(data.curves, "validation_kl").data[0]
    assert len(sparse.x) == sum("validation_kl" in point for point in data.curves["child"])
    assert evidence.training({}, "loss") is None


def test_time_names_every_stage(data: ReportData) -> None:
    (bars,) = evidence.stage_seconds(data.seconds).data
    assert [*bars.y] == [*data.seconds]
    assert bars.text[1] == "24 min 20 s"


def test_log_axis_labels_the_fewer_digits_the_further_it_goes() -> None:
    assert theme.log_axis([0.0, 1e-4, 1.0])["dtick"] == 1
    assert theme.log_axis([0.06, 1.0])["dtick"] == "D2"
    assert theme.log_axis([0.3, 1.0])["dtick"] is None
    assert theme.log_axis([])["dtick"] is None
