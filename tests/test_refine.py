"""Sequential refinement: it helps, a layer never ends worse, and a refinement cut off goes on where it stood."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.library.conftest import CutData, Killed

from puzzle.child import Child, realise, refine
from puzzle.data import TokenData
from puzzle.errors import PuzzleError
from puzzle.evaluate import evaluate
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, read_tensors

BLOCKS = ("none+w32", "kv4+w64", "none+none", "kv1+linear")
TOKENS = 2048  # 8 steps


def run_with(run: Run, folder: Path, *, memory: int | None = None, disk: int | None = None, **settings: Any) -> Run:
    """A run of the same recipe but these settings of `refine`, in a folder of its own."""
    recipe = run.recipe
    refine = recipe.refine.model_copy(update={"tokens": TOKENS} | settings)
    execution = recipe.execution.model_copy(update={"memory": memory, "disk": disk})
    return Run(folder, recipe.model_copy(update={"refine": refine, "execution": execution}))


@pytest.fixture(scope="module")
def child(pico_run: Run, pico_parent: Parent, pico_library: Library) -> Child:
    return realise(pico_run, pico_parent, pico_library, BLOCKS)


@pytest.fixture(scope="module")
def refined(
    tmp_path_factory: pytest.TempPathFactory, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> Child:
    return refine(run_with(pico_run, tmp_path_factory.mktemp("refined")), pico_parent, child, pico_data)


def losses(refined: Child) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = read_json(refined.path.with_name("layers.json"))
    return rows


def changed(one: Child, other: Child) -> set[str]:
    """Names of the weights that are not the same."""
    first, second = (read_tensors(child.path / "model.safetensors") for child in (one, other))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_a_refined_child_is_closer_to_the_parent(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, refined: Child
) -> None:
    before, after = (evaluate(pico_run, pico_parent, each, pico_data, "child") for each in (child, refined))
    assert after["kl"] < before["kl"]
    assert refined.architecture == child.architecture


def test_no_layer_ends_worse_and_losses_are_those_of_the_child_as_it_is(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, refined: Child
) -> None:
    """Layer by layer from a plain forward of both models; a layer without weights passes through."""
    tokens = pico_run.recipe.library.validation_tokens
    sequences = torch.cat(list(pico_data.inputs("validation", 8, tokens)))
    teacher, student = pico_parent.load(), refined.load()
    target_BTD = hidden_BTD = teacher.embed(sequences)
    context = teacher.model.context(hidden_BTD)
    rows = losses(refined)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] < row["initial_loss"] for row in rows] == [True, True, False, True]
    for own, layer, row in zip(teacher.model.layers, student.model.layers, rows, strict=True):
        entered_BTD, target_BTD = target_BTD, own(target_BTD, **context)
        hidden_BTD = layer(hidden_BTD, **context)
        loss = (hidden_BTD - target_BTD).square().mean() / (target_BTD - entered_BTD).square().mean()
        assert row["loss"] <= row["initial_loss"]
        assert float(loss) == pytest.approx(row["loss"], rel=1e-4)


def test_layers_before_the_first_that_differs_are_left_alone(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    child = realise(pico_run, pico_parent, pico_library, ("kv4+w64", "kv4+w64", "kv1+w64", "kv4+w64"))
    refined = refine(run_with(pico_run, tmp_path), pico_parent, child, pico_data)
    assert [row["layer"] for row in losses(refined)] == [2, 3]
    assert {name.split(".")[2] for name in changed(child, refined)} == {"2", "3"}


def test_weights_that_became_worse_are_not_kept(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> None:
    refined = refine(run_with(pico_run, tmp_path, learning_rate=1e3), pico_parent, child, pico_data)
    assert not changed(refined, child)
    assert all(math.isfinite(row["loss"]) for row in losses(refined))


def test_without_tokens_or_difference_it_is_the_child_itself(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData, child: Child
) -> None:
    assert refine(run_with(pico_run, tmp_path, tokens=0), pico_parent, child, pico_data) is child
    own = realise(pico_run, pico_parent, pico_library, pico_parent.architecture.names)
    assert refine(run_with(pico_run, tmp_path), pico_parent, own, pico_data) is own
    assert not (tmp_path / "stages").exists()


def test_a_streamed_parent_gives_the_same_child(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, refined: Child
) -> None:
    again = refine(run_with(pico_run, tmp_path, memory=1), pico_parent, child, pico_data)
    assert not changed(again, refined)
    left = {file.name for file in again.path.parent.iterdir()}
    assert left == {"stage.json", "clock.json", "manifest.json", "checkpoint", "architecture.json", "layers.json"}


@pytest.mark.usefixtures("saves_every_step")
def test_a_refinement_killed_again_and_again_ends_with_the_same_weights(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, refined: Child
) -> None:
    run, kills, again = run_with(pico_run, tmp_path), 0, None
    while again is None:
        try:
            again = refine(run, pico_parent, child, CutData.of(pico_data, 25 + 5 * kills))
        except Killed:
            kills += 1
            assert kills < 99
    assert kills > 3
    assert not changed(again, refined)
    assert losses(again) == losses(refined)


def test_too_little_disk_is_told(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> None:
    with pytest.raises(PuzzleError, match=r"^execution\.disk: the activations of .*; raise execution\.disk"):
        refine(run_with(pico_run, tmp_path, disk=1000), pico_parent, child, pico_data)
