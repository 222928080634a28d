"""What a reader sees: the page whole, quiet (it loads nothing), complete and escaped; the tables; the model card."""

import base64
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from puzzle.quantities import QUANTITIES
from puzzle.recipe import TargetSettings
from puzzle.report import ReportData, final_table, model_card, render
from puzzle.report.page import answers
from puzzle.report.tables import METRICS, result, task_result
from puzzle.units import format_number

HOSTILE = "</script><script>alert(1)</script><b>&amp;"
MEASURED = ("measured_tok_s", "measured_prefill_ms", "measured_decode_ms")
Make = Callable[..., ReportData]


class Page(HTMLParser):
    """What a browser would see of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str | None] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)
            if self.open[-1] in ("td", "th"):
                self.rows[-1].append(data)


def figures(html: str) -> dict[str, Any]:
    """The figures as the page's script unpacks them."""
    scripts = re.findall(r'<script type="text/plain" id="packed-(\w+)" data-size="(\d+)">(.*?)</script>', html)
    packed = {name: gzip.decompress(base64.b85decode(text)[: int(size)]) for name, size, text in scripts}
    assert packed["plotly"].startswith(b"/**\n* plotly.js")
    found: dict[str, Any] = json.loads(packed["figures"])
    return found


def points(figure: dict[str, Any]) -> dict[str, Any]:
    """The traces of a figure by name, or by the text beside a point."""
    return {trace.get("name") or trace.get("text", ["line"])[0]: trace for trace in figure["data"]}


@pytest.fixture(scope="module")
def data(make_data: Make) -> ReportData:
    return make_data()


@pytest.mark.parametrize("layers", [8, 80])
def test_page_is_well_formed_small_and_loads_nothing(make_data: Make, layers: int) -> None:
    html = render(make_data(layers))
    page = Page(html)
    assert page.open == []
    assert page.loads == []
    assert "default-src 'none'" in html
    assert len(html.encode()) < 1.9e6
    places = re.findall(r'class="plot" id="(\w+)"', html)
    assert places == [*figures(html)]


def test_page_has_every_section_with_its_numbers(data: ReportData) -> None:
    page = Page(render(data))
    speed_up = data.rows["child"]["measured_tok_s"] / data.rows["parent"]["measured_tok_s"]
    memory = f"{data.solution.predicted['memory_bytes'] / 1e6:.1f} MB"
    # KL 0.05 against the uniform child's 0.07; perplexity e^2.55 against e^2.5.
    assert page.text["strong"] == [f"{speed_up:.2f}x", "0.714x", "+5.1%", memory]
    uniform = data.rows["uniform"]["measured_tok_s"] / data.rows["child"]["measured_tok_s"]
    assert (
        f"0.0500 nats a token against 0.0700; it is measured at {uniform:.2f}x the child's speed" in page.text["small"]
    )
    assert "12.2 to 12.8 on test text; the parent's likeliest token in 95.0 %" in page.text["small"]
    headings = ["Warnings", "Target", "Result", "Architecture", "Scores", "Quality against speed"]
    headings += ["Global knowledge distillation", "Proof of the search", "Time", "Recipe", "Versions"]
    assert page.text["h2"] == headings
    _, body = result(data.rows)
    assert len(body) == len(METRICS) + 3 - 1  # all parameters of a dense model are active
    head, tasks = task_result(data.tasks)
    assert head == ["task", "parent", "child", "uniform", "child keeps", "uniform keeps"]
    assert ["local_arc_challenge", "0.450±0.010", "0.430±0.010", "0.410±0.010", "90.0 %", "80.0 %"] in tasks
    assert ["at_chance", "0.260±0.010", "0.240±0.010", "0.220±0.010", "-", "-"] in tasks
    assert tasks[-1] == ["mean", "-", "-", "-", "94.4 %", "88.9 %"]
    check = ["child, search 1", "time per output token", "3.00 ms", "2.00 ms", "+50.0%"]
    times = [["library", "24 min 20 s"], ["in all", "24 min 56 s"]]
    for row in [*body, *tasks, check, *map(list, answers(data)), ["1-2", "kv2+w256", "kv8+w512"], *times]:
        assert row in page.rows
    assert page.text["li"] == ["close other <programs>"]
    assert page.text["pre"] == [data.recipe_yaml]
    assert {"proven optimal to 0.01 (HiGHS 1.12.0, 1.7 s)", version("torch"), "Example CPU <8 cores>"} <= {
        *page.text["dd"]
    }


def test_what_was_calculated_is_not_called_measured(data: ReportData) -> None:
    rows = {name: dict(row) | dict.fromkeys(MEASURED, math.nan) for name, row in data.rows.items()}
    calculated = replace(data, rows=rows)
    page = Page(render(calculated))
    assert "the parent's throughput, predicted" in page.text["div"]
    assert [line[2:] for line in answers(calculated)] == [("- (-)", "not measured"), ("exact", "met")]
    assert ["throughput, tok/s", *"-----"] in page.rows


def test_texts_speak_of_a_uniform_child_only_if_there_is_one(data: ReportData) -> None:
    rows = {name: row for name, row in data.rows.items() if name != "uniform"}
    assert "niform child" in render(data)
    assert "niform" not in render(replace(data, uniform=None, rows=rows, tasks={})).partition("<script")[0]


def test_ratios_are_of_the_parent_that_the_target_refers_to(data: ReportData) -> None:
    """A relative bound is of the measured parent, which may be faster than the predicted one, at its own batch size."""
    parent = dict(data.rows["parent"]) | {"measured_prefill_ms": 50.0, "measured_decode_ms": 1.0, "batch_size": 128}
    child = dict(data.rows["child"]) | {"measured_prefill_ms": 20.0, "measured_decode_ms": 0.2}
    found = answers(replace(data, rows=data.rows | {"parent": parent, "child": child}))
    own, its = 1e3 * 128 * 64 / (50 + 63), 1e3 * 64 * 64 / (20 + 63 * 0.2)
    predicted = data.solution.predicted["throughput_tok_s"]
    asked = f"throughput at least 1.9x the parent's, {format_number(1.9 * own, 4)} tok/s"
    ratio = format_number(predicted / data.solution.parent["throughput_tok_s"])
    shown = f"{format_number(predicted, 4)} tok/s ({ratio}x)"
    measured = f"{format_number(its, 4)} tok/s ({format_number(its / own)}x)"
    assert found[0] == (asked, shown, measured, f"missed by {format_number(100 * (1 - its / own / 1.9))} %")


def test_the_noise_of_scores_stands_beside_them_if_there_is_any(data: ReportData) -> None:
    assert "parent to itself" not in render(data) + model_card(data)
    noisy = replace(data, scores=replace(data.scores, noise=4e-4))
    floor = f"the noise floor ({format_number(4e-4)}"
    assert f"Below {floor}, the parent to itself when rounded otherwise) blocks count as equal." in render(noisy)
    score = f"- sum of scores {format_number(data.solution.score, 4)}"
    assert f"{score}\n\n## Recipe" in model_card(data)
    known = f"{score}; each is known to {format_number(4e-4)}, the KL of the parent to itself when rounded otherwise"
    assert f"{known}\n\n## Recipe" in model_card(noisy)


def test_text_is_escaped(data: ReportData) -> None:
    costs = replace(data.costs, environment={HOSTILE: HOSTILE})
    own = dict.fromkeys(("title", "parent", "recipe_yaml"), HOSTILE)
    lists = {"warnings": [HOSTILE], "seconds": {HOSTILE: 1.0}}
    page = Page(render(replace(data, **own, **lists, costs=costs)))
    assert page.open == []
    assert page.tags.count("script") == 3
    for place in ("title", "h1", "pre", "li", "dt", "dd", "td"):
        assert HOSTILE in page.text[place]


def test_figures_show_what_was_chosen_and_what_it_was_worth(data: ReportData) -> None:
    drawn = figures(render(data))
    bars = [trace for trace in drawn["architecture"]["data"] if isinstance(trace["marker"]["color"], list)]
    attention, ffn = (trace["y"] for trace in bars)
    assert attention == [1.0, 0.25, 0.25, 0.15, 0.0, 0.0, 0.25, 0.25]  # 0.15: the slab of a linear map
    assert ffn == [-1.0, -0.5, -0.5, -0.5, -0.15, 0.0, -0.5, -0.5]
    (heat,) = drawn["scores"]["data"]
    rows = drawn["scores"]["layout"]["yaxis"]["ticktext"]
    assert rows[:4] == ["attention kv8", "attention kv2", "attention linear", "attention none"]
    assert [name for name, dots in zip(rows, heat["text"], strict=True) if dots[3]] == ["attention linear", "FFN w256"]
    kl = data.scores.by_key[3, "linear+w512"].kl
    assert heat["z"][rows.index("attention linear")][3] == pytest.approx(math.log10(kl))
    assert heat["z"][rows.index("attention none")][1] is None
    marked = points(drawn["frontier"])
    assert marked["<b>child</b>"]["y"] == [data.solution.score]
    assert len(marked["line"]["x"]) == 8
    assert {"parent", "target"} == {item["text"] for item in drawn["frontier"]["layout"]["annotations"]}
    assert points(drawn["training"])["child"]["y"][1] == 0.25


@pytest.mark.parametrize("linear", [(0, 3, 5, 7), (6,), range(8)])
def test_bars_are_one_layer_wide_whatever_the_mixture(data: ReportData, linear: Sequence[int]) -> None:
    """Plotly's own width is the least distance of a trace's bars."""
    blocks = tuple("linear+w256" if layer in linear else "kv2+linear" for layer in range(8))
    figure = figures(render(replace(data, solution=replace(data.solution, blocks=blocks))))["architecture"]
    for trace in figure["data"]:
        assert trace["x"] == [*range(8)]
        assert 0.9 < trace["width"] < 1
        assert len(trace["y"]) == 8
    slabs = [trace for trace in figure["data"] if isinstance(trace["marker"]["color"], list)]
    for half, places in zip(slabs, (linear, set(range(8)) - set(linear)), strict=True):
        assert {layer for layer, y in enumerate(half["y"]) if abs(y) == 0.15} == {*places}


def test_the_frontier_is_drawn_from_1x_on_and_what_is_far_above_stands_at_its_edge(data: ReportData) -> None:
    assert data.uniform is not None
    far = replace(data.uniform, score=9.0)
    figure = figures(render(replace(data, uniform=far)))["frontier"]
    marked = points(figure)
    assert figure["layout"]["xaxis"].get("type") is None
    assert marked["<b>uniform</b> at 9.00"]["y"] == [1.5 * max(marked["line"]["y"])]


def test_terminal_has_the_table_of_the_page_within_80_columns(data: ReportData) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(final_table(data.rows, data.tasks))
    assert "…" not in out.getvalue()
    printed = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    head, body = result(data.rows)
    task_head, task_body = task_result(data.tasks)
    both = [["child", "uniform"], [name.split()[-1] for name in task_head], *task_body]
    assert printed == [" ".join(row).split() for row in [head, *(row for row in body if len(row) > 1), *both]]


def test_a_number_that_is_not_there_is_a_dash() -> None:
    head, body = result({"child": {"kl": 0.25, "top1": math.nan}, "parent": {"kl": 0.0, "top1": 0.5}})
    assert head == ["", "parent", "child", "child / parent"]
    assert ["KL to the parent", "0", "0.250", "-"] in body
    assert ["top-1 accuracy", "50.0 %", "-", "-"] in body


@pytest.mark.parametrize(
    ("quantity", "bound", "verdict"),
    [
        ("throughput_tok_s", "14000 tok/s", "met"),  # 64 * 64 tokens in 150 + 63 * 2 = 276 ms
        ("throughput_tok_s", "16000 tok/s", "missed by 7.25 %"),
        ("request_ms", "277ms", "met"),
        ("request_ms", "240ms", "missed by 15.0 %"),
        ("prefill_ms", "100ms", "missed by 50.0 %"),
        ("decode_ms", "2ms", "met"),
        ("memory_bytes", "1TB", "met"),
        ("params", "1", "missed by"),
        ("score", 1e-3, "missed by"),
    ],
)
def test_target_is_judged_by_what_was_measured(
    make_data: Make, quantity: str, bound: str | float, verdict: str
) -> None:
    data = make_data()
    row = {"measured_prefill_ms": 150.0, "measured_decode_ms": 2.0, "batch_size": 64}
    target = TargetSettings.model_validate({QUANTITIES[quantity].setting: bound})
    ((*_, found),) = answers(replace(data, rows={"child": row}, targets=[target]))
    assert found.startswith(verdict)


def test_model_card_has_the_facts(data: ReportData) -> None:
    card = model_card(data)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in [*result(data.rows)[1], *task_result(data.tasks)[1]]:
        assert len(line) == 1 or f"| {' | '.join(line)} |\n" in card
    for asked, predicted, measured, verdict in answers(data):
        assert f"- {asked}; predicted {predicted}; measured {measured}: {verdict}\n" in card
    assert "prompt 256, generate 64, batch 64, threads 2, device name Example CPU <8 cores>" in card
    assert "      throughput: 1.9x\n" in card
    assert f"base_model: {data.parent}\nlicense: unknown\n" in card


def test_model_card_names_no_folder_of_this_machine(data: ReportData, tmp_path: Path) -> None:
    sources = [str(tmp_path / "a b.jsonl"), "~/text.txt", "org/dataset:config:train"]
    recipe_yaml = yaml.safe_dump({"parent": str(tmp_path / "llama"), "data": {"source": sources}})
    card = model_card(replace(data, parent=str(tmp_path / "llama"), recipe_yaml=recipe_yaml), license="apache-2.0")
    assert str(tmp_path) not in card
    assert "base_model: llama\nlicense: apache-2.0\n---\n# A child of llama\n" in card
    assert "      - a b.jsonl\n      - text.txt\n      - org/dataset:config:train\n" in card
