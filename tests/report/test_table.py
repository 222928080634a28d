"""The result table, the first numbers to read, the summary and the model card."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from puzzle.artefacts import Bounds
from puzzle.report import ReportData, final_table, model_card, numbers, summary, versions
from puzzle.report.headline import checks, tiles
from puzzle.report.table import METRICS, lines

ROWS = {
    "child": {"test_loss": 2.1, "top1": 0.45, "weight_bytes": 3e9, "kv_bytes": 1e9, "measured_tok_s": 200.0},
    "parent": {"test_loss": 2.0, "top1": 0.5, "weight_bytes": 6e9, "kv_bytes": 2e9, "measured_tok_s": 100.0, "kl": 0.0},
}


def printed(rows: dict[str, dict[str, float]], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(final_table(rows))
    return out.getvalue()


def test_lines_put_the_parent_first_and_divide_by_it() -> None:
    table = {line.metric.key: line for line in lines(ROWS)}
    assert table["test_loss"].cells == ["2.000", "2.100"]
    assert table["test_loss"].kept == "1.05x"
    assert table["measured_tok_s"].kept == "2.00x"
    assert table["memory_bytes"].values == (8e9, 4e9)
    assert table["kl"].cells == ["0", "-"]
    assert "params" not in table


def test_unknown_numbers_are_shown_by_their_names() -> None:
    line = lines({"parent": {"new_number": 7.0}})[-1]
    assert (line.metric.label, line.cells) == ("new number", ["7.000"])


def test_terminal_has_every_cell_of_the_page_within_80_columns(make_data: Callable[..., ReportData]) -> None:
    rows = make_data(8).rows
    text = printed(rows)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for line in lines(rows):
        assert " ".join([line.metric.label, *line.cells, line.kept]) in words


def test_summary_is_plain_json() -> None:
    found = summary("2x", {"parent": {"kl": 0.0, "test_loss": math.nan}, "child": {"kl": 0.25}})
    assert found == {"target": "2x", "rows": {"parent": {"kl": 0.0, "test_loss": None}, "child": {"kl": 0.25}}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_tiles_are_measured_where_they_can_be(make_data: Callable[..., ReportData]) -> None:
    speed, quality, memory = tiles(replace(make_data(8, partial=True), rows=ROWS))
    assert (speed.number, quality.number, memory.number) == ("2.00x", "90.0 %", "4.00 GB")
    assert "measured" in speed.label
    assert memory.detail.startswith("50.0 %")
    predicted, score, _ = tiles(make_data(8, partial=True))
    assert "predicted" in predicted.label
    assert "not measured yet" in score.detail


def test_quality_falls_back_to_the_loss(make_data: Callable[..., ReportData]) -> None:
    rows = {model: {"test_loss": loss} for model, loss in (("parent", 2.0), ("child", 2.5))}
    assert tiles(replace(make_data(8, partial=True), rows=rows))[1].number == "1.25x"


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        (Bounds(throughput_tok_s=200), "met"),
        (Bounds(throughput_tok_s=250), "missed by 20.0 %"),
        (Bounds(prefill_ms=100), "missed by 50.0 %"),
        (Bounds(decode_ms=2), "met"),
        (Bounds(request_ms=275), "missed by 0.364 %"),  # 150 + 63 * 2 = 276
        (Bounds(request_ms=277), "met"),
        (Bounds(params=1), "missed by"),
        (Bounds(memory_bytes=1e12), "met"),
    ],
)
def test_target_is_judged_by_what_was_measured(
    make_data: Callable[..., ReportData], bounds: Bounds, verdict: str
) -> None:
    data = make_data(8, partial=True)
    row = {"measured_tok_s": 200.0, "measured_prefill_ms": 150.0, "measured_decode_ms": 2.0}
    data = replace(data, rows={"child": row}, solution=replace(data.solution, asked=bounds))
    (check,) = checks(data)
    assert check.verdict.startswith(verdict)


def test_nothing_is_judged_before_it_is_measured(make_data: Callable[..., ReportData]) -> None:
    found = {check.quantity: check.verdict for check in checks(make_data(8, partial=True))}
    assert found == {"throughput": "not measured yet", "memory": "met"}


def test_model_card_has_the_table_and_the_recipe(make_data: Callable[..., ReportData]) -> None:
    data = make_data(8)
    card = model_card(data)
    for line in lines(data.rows):
        assert f"| {line.metric.label} | {' | '.join(line.cells)} | {line.kept} |" in card
    assert "      throughput: 1.9x # & more" in card
    assert "Nothing is measured yet" in model_card(make_data(8, partial=True))


def test_versions_name_what_results_depend_on() -> None:
    assert versions()["torch"].startswith("2.")
    assert {"python", "transformers"} <= versions().keys()


def test_metrics_have_distinct_names() -> None:
    assert len({metric.key for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)


@given(st.floats(1e-12, 1e15), st.integers(2, 6))
def test_numbers_keep_their_significant_digits(value: float, digits: int) -> None:
    shown = float(numbers.significant(value, digits).replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.5001 * 10 ** (1 - digits))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (numbers.significant(999.6), "1,000"),
        (numbers.significant(math.inf), "-"),
        (numbers.size(1.5e9), "1.50 GB"),
        (numbers.size(12), "12.0 B"),
        (numbers.count(8.03e9), "8.03 B"),
        (numbers.count(950), "950"),
        (numbers.duration(12.3), "12.3 s"),
        (numbers.duration(3599.7), "1 h 00 min"),
        (numbers.duration(192), "3 min 12 s"),
        (numbers.signed_percent(-0.031), "-3.1 %"),
    ],
)
def test_numbers_read_well(text: str, wanted: str) -> None:
    assert text == wanted
