"""Layers cut into ranges, and what is left of a stage's folder afterwards."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.distributed.tasks import for_layers, split
from puzzle.errors import PuzzleError
from puzzle.runs import Run
from puzzle.stages import Stage


@given(st.lists(st.floats(0.0, 1e12), min_size=1, max_size=40), st.integers(1, 12))
def test_ranges_hold_every_layer_once_and_none_is_empty(costs: list[float], parts: int) -> None:
    ranges = split(costs, parts)
    assert [layer for layers in ranges for layer in layers] == list(range(len(costs)))
    assert all(ranges)
    assert len(ranges) <= parts


@given(st.integers(1, 8), st.integers(1, 10))
def test_equal_layers_are_cut_evenly(parts: int, each: int) -> None:
    assert [len(layers) for layers in split([3.0] * (parts * each), parts)] == [each] * parts


def test_no_range_costs_much_more_than_its_share() -> None:
    costs = [float(80 - layer) for layer in range(80)]  # suffixes
    sums = [sum(costs[layer] for layer in layers) for layers in split(costs, 8)]
    assert len(sums) == 8
    assert max(sums) <= sum(costs) / 8 + max(costs)


def test_here_one_task_does_all_layers_and_its_folder_goes(pico_run: Run) -> None:
    stage = pico_run.open(Stage(name="tasks", help=""))
    seen: list[range] = []

    def task(layers: range, folder: Path) -> None:
        (folder / "state").write_text("kept for a restart")
        (stage.path / "result").write_text("kept")
        seen.append(layers)

    for_layers(pico_run, stage, task, [1.0, 2.0, 1.0])
    assert seen == [range(3)]
    assert [file.name for file in stage.path.iterdir() if file.suffix != ".json"] == ["result"]


def test_without_ray_the_command_says_what_to_install(pico_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "puzzle.distributed.ray", raising=False)
    run = Run(pico_run.path, pico_run.recipe, on="ray")
    stage = run.open(Stage(name="tasks", help="", version=2))
    with pytest.raises(PuzzleError, match=r"^--on: ray is not installed; pip install 'puzzle-llm\[ray\]'"):
        for_layers(run, stage, lambda layers, folder: None, [1.0])
