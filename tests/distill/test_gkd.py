"""GKD brings a damaged child closer to its parent, and leaves an undamaged one where it is."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import puzzle.training
from puzzle.child import Child, realise
from puzzle.data import TokenData
from puzzle.distill import distil, distillation_curve, spikes, trainer
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

BLOCKS = ("kv1+w8", "kv4+w64", "none+w64", "kv2+linear")
NEW_LAYERS = ("layers.0.", "layers.2.", "layers.3.")

Distil = Callable[..., Child]


@pytest.fixture(scope="session")
def child(pico_run: Run, pico_parent: Parent, pico_library: Library) -> Child:
    return realise(pico_run, pico_parent, pico_library, BLOCKS)


@pytest.fixture
def distilled(pico_run: Run, pico_parent: Parent, pico_data: TokenData, child: Child, tmp_path: Path) -> Distil:
    """Distil the child with other settings, in a run folder of its own."""

    def run(folder: str = "run", **settings: Any) -> Child:
        (tmp_path / folder).mkdir(exist_ok=True)
        changed = DistilSettings.model_validate(pico_run.recipe.distil.model_dump() | {"tokens": 3072} | settings)
        recipe = pico_run.recipe.model_copy(update={"distil": changed})
        own = replace(pico_run, path=tmp_path / folder, recipe=recipe, _used={})
        return distil(own, pico_parent, child, pico_data)

    return run


def weights(child: Child) -> dict[str, Tensor]:
    return load_file(child.path / "model.safetensors")


def kl(child: Child) -> list[float]:
    return [point["validation_kl"] for point in distillation_curve(child)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "muon"},
        {"divergence": "skewed", "accumulate": 2, "checkpointing": True, "ladder": 0.25},
        {"teacher_cache": 8, "documents": False},
    ],
    ids=str,
)
def test_distillation_lowers_the_held_out_kl(settings: dict[str, Any], distilled: Distil, child: Child) -> None:
    found = distilled(tokens=8192, **settings)
    curve = distillation_curve(found)
    assert curve[0]["step"] == 0
    assert curve[-1]["tokens"] >= 8192
    assert curve[-1]["validation_kl"] < 0.9 * curve[0]["validation_kl"]
    assert found.architecture == child.architecture
    assert found.address != child.address
    assert not list(found.path.parent.glob("*.safetensors"))


def test_the_parent_itself_starts_without_a_loss(
    pico_run: Run, pico_parent: Parent, pico_library: Library, pico_data: TokenData
) -> None:
    own = tuple(block.name for block in pico_parent.architecture.blocks)
    realised = realise(pico_run, pico_parent, pico_library, own)
    found = distil(pico_run, pico_parent, realised, pico_data)
    start = distillation_curve(found)[0]
    assert start["validation_kl"] == pytest.approx(0.0, abs=1e-6)
    assert start["loss"] == pytest.approx(0.0, abs=1e-5)
    before, after = weights(realised), weights(found)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_diverged_training_stops_with_a_line(distilled: Distil) -> None:
    with pytest.raises(PuzzleError, match=r"lower distil\.learning_rate"):
        distilled(learning_rate=1e30)


def test_skips_in_a_row_stop_the_training_with_a_line(distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.SpikeGuard, "_is_usual", lambda self, found: False)
    monkeypatch.setattr(trainer, "_VALIDATIONS", 1)
    with pytest.raises(PuzzleError, match=r"10 steps in a row .* lower distil\.learning_rate"):
        distilled()


def test_a_skipped_step_changes_nothing(distilled: Distil, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.SpikeGuard, "admits", lambda self, loss, norm: False)
    found = distilled()
    assert kl(found) == [kl(found)[0]] * len(kl(found))
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(child).items())


def test_only_new_blocks_train_where_that_is_asked(distilled: Distil, child: Child) -> None:
    before, after = weights(child), weights(distilled(new_only=1))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if any(layer in name for layer in NEW_LAYERS)}


def test_all_blocks_train_after_the_share_of_steps(distilled: Distil, child: Child) -> None:
    before, after = weights(child), weights(distilled(new_only=0.5))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_parts_of_a_step_give_the_step(distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[dict[str, float]] = []
    take_step = trainer.Training._step

    def recorded(training: trainer.Training, step: int) -> dict[str, float]:
        numbers.append(take_step(training, step))
        return dict(numbers[-1])

    monkeypatch.setattr(trainer.Training, "_step", recorded)
    whole, parts = (weights(distilled(tokens=256, lm_weight=0.5, accumulate=count)) for count in (1, 4))
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon", "new_only": 0.3, "ladder": 0.2}], ids=str)
def test_a_training_that_was_cut_off_ends_as_if_it_never_was(
    settings: dict[str, Any], distilled: Distil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puzzle.training, "CHECKPOINT_INTERVAL_S", 0.0)
    # About every second step is skipped, so that what the guard remembers matters.
    monkeypatch.setattr(spikes, "_LEAST", 2)
    monkeypatch.setattr(spikes, "_NORM_FACTOR", 1.0)
    expected = distilled("undisturbed", **settings)
    take_step = trainer.Training._step

    def killed(at: int) -> Callable[..., dict[str, float]]:
        def step(self: trainer.Training, index: int) -> dict[str, float]:
            if index == at:
                raise KeyboardInterrupt
            return take_step(self, index)

        return step

    for at in (5, 9):
        monkeypatch.setattr(trainer.Training, "_step", killed(at))
        with pytest.raises(KeyboardInterrupt):
            distilled("disturbed", **settings)
    monkeypatch.setattr(trainer.Training, "_step", take_step)
    found = distilled("disturbed", **settings)
    assert distillation_curve(found) == distillation_curve(expected)
    assert all(torch.equal(value, weights(found)[name]) for name, value in weights(expected).items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_saves_its_last_step(
    number: signal.Signals, distilled: Distil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_step = trainer.Training._step

    def step(training: trainer.Training, index: int) -> dict[str, float]:
        if index == 4:
            os.kill(os.getpid(), number)
        return take_step(training, index)

    monkeypatch.setattr(trainer.Training, "_step", step)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        distilled()
    assert [path.name for path in tmp_path.glob("run/stages/distil-*/training*")] == ["training000005"]
    assert signal.getsignal(number) is handler


class _Points:
    """The held-out curve made up: the second point is the best."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, Tensor]] = []
        monkeypatch.setattr(trainer.Training, "_point", lambda training, step: self.point(training, step))

    def point(self, training: trainer.Training, step: int) -> dict[str, float]:
        self.seen.append({name: value.detach().clone() for name, value in training._parameters.items()})
        kl = {1: 5.0, 2: 1.0, 3: 2.0}.get(len(self.seen), 3.0)
        return {"step": step, "tokens": step, "loss": kl, "validation_kl": kl}


def test_the_best_point_is_the_result(distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    points = _Points(monkeypatch)
    found = weights(distilled())
    assert len(points.seen) > 4
    assert all(torch.equal(value, points.seen[1][name]) for name, value in found.items())


def test_patience_ends_the_training(distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    points = _Points(monkeypatch)
    found = distilled(patience=2)
    assert len(points.seen) == len(distillation_curve(found)) == 4
    assert all(torch.equal(value, points.seen[1][name]) for name, value in weights(found).items())


def test_what_shows_or_saves_memory_changes_no_address(distilled: Distil) -> None:
    assert distilled().address == distilled(log=[], checkpointing=True).address
    assert distilled().address != distilled(documents=False).address


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_curves_go_to_a_tracker(package: str, distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    closed: list[bool] = []

    class Writer:
        def __init__(self, *_: object) -> None: ...
        def add_scalar(self, name: str, number: float, step: int) -> None:
            seen.append((step, {name: number}))

        def log(self, numbers: dict[str, float], step: int) -> None:
            seen.append((step, numbers))

        def close(self) -> None:
            closed.append(True)

        finish = close

    module = "wandb" if package == "wandb" else "torch.utils.tensorboard"
    stub = SimpleNamespace(SummaryWriter=Writer, init=lambda **_: Writer())
    monkeypatch.setitem(sys.modules, module, stub)  # type: ignore[arg-type]
    distilled(log=[package])
    assert {step for step, _ in seen} == set(range(1, 13))
    assert {"loss", "held-out KL", "tokens/s"} <= {name for _, numbers in seen for name in numbers}
    assert closed == [True]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"log": ["wandb"]}, r"distil\.log: wandb"), ({"optimizer": "adamw8bit"}, "pip install torchao")],
)
def test_what_is_not_installed_is_named(
    settings: dict[str, Any], named: str, distilled: Distil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(PuzzleError, match=named):
        distilled(**settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"accumulate": 3}, "does not divide batch_size 8"),
        ({"teacher_cache": 8, "divergence": "reverse"}, "keeps too little"),
        ({"teacher_cache": 8, "kl_weight": 0}, "raise kl_weight"),
        ({"skew": 1.0}, "less than 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DistilSettings.model_validate(settings)
