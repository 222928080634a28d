"""Sequential refinement: it helps, a layer never ends worse, and a refinement cut off goes on where it stood."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puzzle.child import Child, realise, refine
from puzzle.data import TokenData
from puzzle.distributed.state import SaveTimer
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.metrics import compare
from puzzle.parents import Parent
from puzzle.runs import Run, read_json, read_tensors

BLOCKS = ("none+w32", "kv4+w64", "none+none", "kv1+linear")
TOKENS = 2048  # 8 steps


def run_with(run: Run, folder: Path, *, memory: int | None = None, disk: int | None = None, **settings: Any) -> Run:
    """A run of the same recipe but these settings of `refine`, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    recipe = run.recipe.model_copy(
        update={
            "refine": run.recipe.refine.model_copy(update={"tokens": TOKENS} | settings),
            "execution": run.recipe.execution.model_copy(update={"memory": memory, "disk": disk}),
        }
    )
    return Run(folder, recipe)


@pytest.fixture(scope="module")
def child(pico_run: Run, pico_parent: Parent, pico_library: Library) -> Child:
    return realise(pico_run, pico_parent, pico_library, BLOCKS)


@pytest.fixture(scope="module")
def refined(
    tmp_path_factory: pytest.TempPathFactory, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> Child:
    return refine(run_with(pico_run, tmp_path_factory.mktemp("refined")), pico_parent, child, pico_data)


def weights(child: Child) -> dict[str, Tensor]:
    return read_tensors(child.path / "model.safetensors")


def same_weights(one: Child, other: Child) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def final_errors(parent: Parent, child: Child, data: TokenData) -> tuple[float, float]:
    """On text that nothing was trained or chosen on: error of the last hidden states, and KL."""
    sequences = data.sequences("test", slice(0, 16))
    teacher, student = parent.load(), child.load()
    hiddens = []
    for model in (teacher, student):
        hidden_BTD = model.embed(sequences[:, :-1])
        context = model.model.context(hidden_BTD)
        for layer in model.model.layers:
            hidden_BTD = layer(hidden_BTD, **context)
        hiddens.append(hidden_BTD.flatten(0, 1))
    metrics = compare(teacher, student, hiddens[0], hiddens[1].unsqueeze(0), sequences[:, 1:].flatten())
    return float((hiddens[1] - hiddens[0]).square().mean()), float(metrics.kl.mean())


def test_a_refined_child_is_closer_to_the_parent(
    pico_parent: Parent, pico_data: TokenData, child: Child, refined: Child
) -> None:
    (error, kl), (refined_error, refined_kl) = (final_errors(pico_parent, c, pico_data) for c in (child, refined))
    assert refined_error < error
    assert refined_kl < kl
    assert refined.architecture == child.architecture


def test_no_layer_ends_worse_and_one_without_weights_passes_through(refined: Child) -> None:
    rows = read_json(refined.path.with_name("layers.json"))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert all(row["loss"] <= row["initial_loss"] for row in rows)
    assert [row["loss"] < row["initial_loss"] for row in rows] == [True, True, False, True]


def test_the_losses_are_those_of_the_child_as_it_is(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, refined: Child
) -> None:
    """Layer by layer from a plain forward of both models: what is stored is what was measured."""
    tokens = pico_run.recipe.library.validation_tokens
    sequences = torch.cat(list(pico_data.batches("validation", 8, tokens)))[:, :-1]
    teacher, student = pico_parent.load(), refined.load()
    target_BTD = hidden_BTD = teacher.embed(sequences)
    context = teacher.model.context(hidden_BTD)
    rows = read_json(refined.path.with_name("layers.json"))
    for own, layer, row in zip(teacher.model.layers, student.model.layers, rows, strict=True):
        entered_BTD, target_BTD = target_BTD, own(target_BTD, **context)
        hidden_BTD = layer(hidden_BTD, **context)
        loss = (hidden_BTD - target_BTD).square().mean() / (target_BTD - entered_BTD).square().mean()
        assert float(loss) == pytest.approx(row["loss"], rel=1e-4)


def test_layers_before_the_first_that_differs_are_left_alone(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    child = realise(pico_run, pico_parent, pico_library, ("kv4+w64", "kv4+w64", "kv1+w64", "kv4+w64"))
    refined = refine(run_with(pico_run, tmp_path), pico_parent, child, pico_data)
    assert [row["layer"] for row in read_json(refined.path.with_name("layers.json"))] == [2, 3]
    before, after = weights(child), weights(refined)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed} == {"2", "3"}
    assert len(changed) == sum(name.startswith(("model.layers.2.", "model.layers.3.")) for name in before)


def test_weights_that_became_worse_are_not_kept(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> None:
    refined = refine(run_with(pico_run, tmp_path, learning_rate=1e3), pico_parent, child, pico_data)
    assert same_weights(refined, child)
    assert all(math.isfinite(row["loss"]) for row in read_json(refined.path.with_name("layers.json")))


def test_without_tokens_or_difference_it_is_the_child_itself(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData, child: Child
) -> None:
    assert refine(run_with(pico_run, tmp_path, tokens=0), pico_parent, child, pico_data) is child
    own = realise(pico_run, pico_parent, pico_library, tuple(b.name for b in pico_parent.architecture.blocks))
    assert refine(run_with(pico_run, tmp_path), pico_parent, own, pico_data) is own
    assert not (tmp_path / "stages").exists()


def test_a_streamed_parent_gives_the_same_child(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, refined: Child
) -> None:
    run = run_with(pico_run, tmp_path, memory=1)
    assert same_weights(refine(run, pico_parent, child, pico_data), refined)
    left = {file.name for file in next(tmp_path.glob("stages/refine-*")).iterdir()}
    assert left == {"stage.json", "clock.json", "manifest.json", "checkpoint", "architecture.json", "layers.json"}


class Killed(BaseException):
    """Stands for a kill."""


class CutData(TokenData):
    left: int

    def sequences(self, *where: Any) -> Tensor:
        object.__setattr__(self, "left", self.left - 1)
        if self.left < 0:
            raise Killed
        return super().sequences(*where)


def test_a_refinement_killed_again_and_again_ends_with_the_same_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    child: Child,
    refined: Child,
) -> None:
    monkeypatch.setattr(SaveTimer, "due", lambda _: True)
    monkeypatch.setattr("puzzle.training.steps_between_looks", lambda _: 1)
    run, kills, again = run_with(pico_run, tmp_path), 0, None
    data = CutData(pico_data.path, pico_data.address, pico_data.sequence_length, pico_data.counts)
    while again is None:
        object.__setattr__(data, "left", 25 + 5 * kills)
        try:
            again = refine(run, pico_parent, child, data)
        except Killed:
            kills += 1
            assert kills < 99
    assert kills > 3
    assert same_weights(again, refined)
    assert read_json(again.path.with_name("layers.json")) == read_json(refined.path.with_name("layers.json"))


def test_too_little_disk_is_told(
    tmp_path: Path, pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child
) -> None:
    with pytest.raises(PuzzleError, match=r"^execution\.disk: the activations of .*; raise execution\.disk"):
        refine(run_with(pico_run, tmp_path, disk=1000), pico_parent, child, pico_data)
