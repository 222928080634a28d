"""The section on whole architectures: every one judged is a point, the best is outlined, each step has its gain."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from puzzle.artefacts import Correction, Judged, Step, WholeScore
from puzzle.report import ReportData, correction, theme
from puzzle.report.page import render
from puzzle.report.sections import sections


def judged(predicted: float, kl: float, step: str) -> Judged:
    whole = WholeScore(kl=kl, kl_se=0.01, lm_loss=3.0, top1_agreement=0.8, cosine=0.1)
    return Judged(blocks=(f"{predicted}",), predicted=predicted, whole=whole, step=step)


@pytest.fixture
def data(make_data: Callable[..., ReportData]) -> ReportData:
    data = make_data(8)
    better = replace(data.solution, blocks=("kv8+w512",) * 8, proof=None)
    points = (judged(0.2, 0.30, "search"), judged(0.21, 0.32, "pool"), judged(0.22, 0.25, "pool"))
    found = Correction(
        score="kl",
        tokens=4096,
        judged=(*points, judged(0.23, 0.24, "rounds")),
        tau=-1 / 3,
        spearman=-0.5,
        steps=(
            Step(name="pool", evaluated=2, before=0.30, after=0.25),
            Step(name="rounds", evaluated=1234, before=0.25, after=0.24),
        ),
        finalists=(),
        ranked=(better, data.solution),
    )
    return replace(data, solution=better, correction=found)


def test_every_architecture_is_a_point_and_the_best_is_outlined(data: ReportData) -> None:
    assert data.correction is not None
    traces = {trace.name: trace for trace in correction.predicted_whole(data.correction).data}
    assert [*traces] == ["the search's own", "its next best", "scored again around the best"]
    assert [*zip(traces["its next best"].x, traces["its next best"].y, strict=True)] == [(0.21, 0.32), (0.22, 0.25)]
    assert [*traces["its next best"].marker.line.width] == [0, 0]
    best = traces["scored again around the best"].marker.line
    assert ([*best.width], [*best.color]) == ([2.5], [theme.OUTLINE])


def test_each_step_has_its_gain_and_its_price(data: ReportData) -> None:
    assert data.correction is not None
    (bars,) = correction.gains(data.correction).data
    assert [*bars.x] == [0.30, 0.25, 0.24]
    assert [*bars.y] == ["search", "pool (2)", "rounds (1,234)"]
    assert [*bars.text] == ["0.300", "0.250 (-16.7 %)", "0.240 (-4.0 %)"]


def test_the_page_says_how_far_the_sums_agree_and_whose_proof_it_is(data: ReportData) -> None:
    page = render(data)
    assert "tau -0.33 (Spearman -0.50)" in page
    assert "The child is another one, better as a whole." in page
    assert data.searched.proof is not None
    assert f"{data.searched.proof.solver}" in page
    assert "another one, better" not in render(replace(data, correction=None))


def test_a_run_without_it_has_no_such_section(make_data: Callable[..., ReportData]) -> None:
    assert "correction" not in [section.anchor for section in sections(make_data(8))]


def test_an_order_that_there_is_not_is_not_told(data: ReportData) -> None:
    assert data.correction is not None
    assert correction.agreement(replace(data.correction, tau=None, spearman=None)) == ""
