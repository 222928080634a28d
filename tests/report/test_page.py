"""The page: whole, quiet (it loads nothing), complete and escaped."""

import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from puzzle.report import ReportData, render, write_report

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "</script><script>alert(1)</script><b>&amp;"


class Page(HTMLParser):
    """What a browser would see of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.values: set[float] = set()
        self.text: dict[str, str] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.loads += [str(given[name]) for name in ("src", "href", "srcset", "action") if name in given]
        if tag == "data":
            self.values.add(float(str(given["value"])))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        place = self.open[-1] if self.open else ""
        self.text[place] = self.text.get(place, "") + data


@pytest.fixture(scope="module", params=["small", "deep", "partial"])
def rendered(request: pytest.FixtureRequest, make_data: Callable[..., ReportData]) -> tuple[ReportData, str]:
    data = {"small": lambda: make_data(8), "deep": lambda: make_data(80), "partial": lambda: make_data(8, partial=True)}
    found = data[request.param]()
    return found, render(found)


def figures(html: str) -> dict[str, dict]:
    start = html.index('id="figures">') + len('id="figures">')
    return json.loads(html[start : html.index("</script>", start)])


def test_page_is_well_formed_and_loads_nothing(rendered: tuple[ReportData, str]) -> None:
    _, html = rendered
    page = Page(html)
    assert page.open == []
    assert page.tags.count("script") == 3
    assert page.loads
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.loads)
    assert "default-src 'none'" in html
    assert len(html.encode()) < 6e6


def test_every_figure_has_one_place(rendered: tuple[ReportData, str]) -> None:
    _, html = rendered
    places = Page(html).ids
    assert len(places) == len(set(places))
    drawn = figures(html)
    assert {"architecture-child", "scores-map", "library-ffn"} <= drawn.keys() <= set(places)


def test_every_number_is_on_the_page(rendered: tuple[ReportData, str]) -> None:
    data, html = rendered
    wanted = {value for row in data.rows.values() for value in row.values()}
    assert wanted <= Page(html).values


def test_unfinished_run_says_so_and_leaves_out_what_is_not_there(make_data: Callable[..., ReportData]) -> None:
    finished, unfinished = render(make_data(8)), render(make_data(8, partial=True))
    assert "Nothing is measured yet" in unfinished
    assert "Nothing is measured yet" not in finished
    measured = {f"prediction-{name}" for name in ("tok_s", "prefill_ms", "decode_ms")}
    measured |= {"training-loss", "training-validation_kl", "frontier-plot", "time-plot"}
    assert measured | {"architecture-uniform"} == figures(finished).keys() - figures(unfinished).keys()


def test_text_is_escaped(make_data: Callable[..., ReportData]) -> None:
    data = make_data(8)
    data = replace(
        data,
        title=HOSTILE,
        parent=HOSTILE,
        recipe_yaml=f"parent: {HOSTILE}\n",
        versions={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        curves={HOSTILE: [{"tokens": 1.0, "loss": 1.0}]},
        rows=data.rows | {HOSTILE: {HOSTILE: 1.0}},
        costs=replace(data.costs, environment={HOSTILE: HOSTILE}),
    )
    html = render(data)
    page = Page(html)
    assert page.tags.count("script") == 3
    assert page.open == []
    assert page.text["title"] == HOSTILE
    assert page.text["pre"] == data.recipe_yaml
    assert figures(html)["training-loss"]["data"][0]["name"] == HOSTILE


def test_written_file_is_the_page(tmp_path: Path, make_data: Callable[..., ReportData]) -> None:
    data = make_data(8, partial=True)
    write_report(tmp_path / "report.html", data)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(data)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
