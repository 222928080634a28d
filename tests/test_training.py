"""The one training loop against an independent plain one, weight by weight; cut off anywhere; parts that diverge."""

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from puzzle.distributed import state
from puzzle.distributed.state import SaveTimer, TrainingState, saved_names
from puzzle.errors import PuzzleError
from puzzle.runs import Progress
from puzzle.training import Part, Trained, adamw, best_point, schedule, train

STEPS, RATE, WARMUP, MAX_NORM = 12, 0.05, 0.25, 0.5


class Task:
    """Two small models that share nothing but the data, a step's data being drawn from its number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models = {name: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)) for name in ("a", "b")}
        self.parameters = {
            f"{name}.{key}": value for name, model in self.models.items() for key, value in model.named_parameters()
        }

    def loss(self, name: str, step: int) -> Tensor:
        inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        scale = 100.0 if name == "a" else 1.0  # only its own gradient is clipped by it
        return scale * (self.models[name](inputs) - inputs[:, :2].square()).square().mean()

    def held_out(self) -> float:
        with torch.no_grad():
            return float(sum(self.loss(name, -1) for name in self.models))


def run(
    folder: Path, disturb: Callable[[Task, str, int], float] = lambda task, name, step: 1.0, steps: int = STEPS
) -> tuple[Task, Trained]:
    """Train both models; `disturb` is what a loss is multiplied by, or raises."""
    task = Task()
    folder.mkdir(exist_ok=True)

    def gradients(step: int) -> Mapping[str, Tensor]:
        losses = {name: task.loss(name, step) * disturb(task, name, step) for name in task.models}
        sum(losses.values()).backward()  # type: ignore[union-attr]
        return losses

    parts = []
    for name, model in task.models.items():
        own = {key: value for key, value in task.parameters.items() if key.startswith(name)}
        parts.append(Part(name, own, [adamw(model.parameters(), RATE, weight_decay=0.1)]))
    trained = train(
        parts,
        gradients,
        steps=steps,
        warmup=WARMUP,
        max_grad_norm=MAX_NORM,
        folder=folder,
        bar=Progress("train", STEPS),
        validate=lambda step: {"step": step, "validation_kl": task.held_out()},
    )
    return task, trained


def plainly(skip: tuple[str, int] | None = None) -> dict[str, Tensor]:
    """The same training from the textbook, one model after the other: AdamW by its formulas (arXiv 1711.05101)."""
    task = Task()
    found = {}
    for name, model in task.models.items():
        state = [(torch.zeros_like(value), torch.zeros_like(value)) for value in model.parameters()]
        count = 0
        for step in range(STEPS):
            if skip == (name, step):
                continue
            count += 1
            rate = RATE * ((step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)))
            gradients = torch.autograd.grad(task.loss(name, step), [*model.parameters()])
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            for parameter, gradient, (first, second) in zip(model.parameters(), gradients, state, strict=True):
                clipped = gradient * min(1.0, MAX_NORM / float(norm))
                first.mul_(0.9).add_(0.1 * clipped)
                second.mul_(0.95).add_(0.05 * clipped.square())
                decay = 0.1 if parameter.ndim > 1 else 0.0
                mean, power = first / (1 - 0.9**count), second / (1 - 0.95**count)
                parameter.data -= rate * (mean / (power.sqrt() + 1e-8) + decay * parameter.data)
        found |= {f"{name}.{key}": value for key, value in model.named_parameters()}
    return found


def test_training_equals_an_independent_loop(tmp_path: Path) -> None:
    task, trained = run(tmp_path)
    torch.testing.assert_close(task.parameters, plainly(), rtol=1e-4, atol=1e-5)
    assert [point["step"] for point in trained.curve] == [0, 2, 4, 6, 8, 10, 12]


def test_a_step_without_a_finite_gradient_is_skipped_for_that_part_alone(tmp_path: Path) -> None:
    task, trained = run(tmp_path, lambda _, name, step: math.nan if (name, step) == ("a", 5) else 1.0)
    torch.testing.assert_close(task.parameters, plainly(skip=("a", 5)), rtol=1e-4, atol=1e-5)
    assert not trained.diverged


def test_a_part_that_diverges_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    task, trained = run(tmp_path / "run", lambda _, name, step: math.inf if name == "a" and step > 1 else 1.0)
    assert trained.diverged == ["a"]
    assert all(value.isfinite().all() for value in task.parameters.values())
    others = [name for name in whole.parameters if name.startswith("b")]
    assert all(torch.equal(task.parameters[name], whole.parameters[name]) for name in others)


def test_training_ends_where_every_part_has_diverged(tmp_path: Path) -> None:
    seen = []
    _, trained = run(tmp_path, lambda _, name, step: seen.append(step) or math.nan, steps=1000)  # type: ignore[func-returns-value]
    assert trained.diverged == ["a", "b"]
    assert max(seen) < 50


@pytest.mark.parametrize("at", range(1, STEPS))
@pytest.mark.usefixtures("saves_every_step")
def test_a_training_that_was_cut_off_ends_with_the_same_weights(at: int, tmp_path: Path) -> None:
    whole, expected = run(tmp_path / "whole")
    steps = []

    def killed(task: Task, name: str, step: int) -> float:
        steps.append(step)
        if len(steps) == 2 * at:
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", killed)
    task, trained = run(tmp_path / "cut", killed)
    assert len(steps) <= 2 * (STEPS + 1)
    assert all(torch.equal(task.parameters[name], whole.parameters[name]) for name in whole.parameters)
    assert trained.curve == expected.curve
    assert all(torch.equal(value, expected.best[name]) for name, value in trained.best.items())


def test_the_weights_of_the_best_point_are_kept(tmp_path: Path) -> None:
    task, trained = run(tmp_path, lambda task, name, step: 1.0 if step < 3 else -1.0)
    found = [point["validation_kl"] for point in trained.curve]
    assert min(found) < found[-1]
    for name, value in trained.best.items():
        task.parameters[name].data.copy_(value)
    assert task.held_out() == best_point(trained.curve)["validation_kl"] == min(found)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    rates = [schedule(step, steps=100, warmup=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_of_a_saved_state_a_part_can_go_on_alone(tmp_path: Path) -> None:
    def parameters(*names: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        made = {name: nn.Parameter(torch.zeros(3)) for name in names}
        return made, adamw(made.values(), 0.1)

    both, optimizer = parameters("matrix", "vector")
    torch.stack([value.sum() for value in both.values()]).sum().backward()
    optimizer.step()
    TrainingState(tmp_path, both, [optimizer]).save(5)
    assert saved_names(tmp_path) == {"matrix", "vector"}
    one, own = parameters("vector")
    assert TrainingState(tmp_path, one, [own]).restore() == 5
    assert torch.equal(one["vector"], both["vector"])
    assert torch.equal(own.state[one["vector"]]["exp_avg"], optimizer.state[both["vector"]]["exp_avg"])
    others, own = parameters("matrix", "unknown")
    assert TrainingState(tmp_path, others, [own]).restore() == 0
    assert not own.state


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are written while the training goes on, as on a GPU."""
    copies = DefaultStager(StagingOptions(*[False] * 4))
    monkeypatch.setattr("puzzle.distributed.state.stager", lambda device: copies)


def test_what_is_saved_beside_a_training_is_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: None
) -> None:
    writer, written = state.write_json, threading.Event()

    def slow(path: Path, names: list[str]) -> None:
        written.wait(60)
        writer(path, names)

    monkeypatch.setattr("puzzle.distributed.state.write_json", slow)
    parameters = {"weight": nn.Parameter(torch.ones(3))}
    with TrainingState(tmp_path, parameters, []) as saved:
        for step in (7, 8):
            saved.save(step)  # of step 8 after step 7 is written
            with torch.no_grad():
                parameters["weight"].add_(1)
            if step == 7:
                assert not saved.timer.due()
                assert not saved_names(tmp_path)
                written.set()
    assert [path.name for path in tmp_path.iterdir()] == ["training000008"]
    assert TrainingState(tmp_path, parameters, []).restore() == 8
    assert parameters["weight"].tolist() == [2.0, 2.0, 2.0]


def test_a_state_that_cannot_be_written_ends_the_training(tmp_path: Path, beside: None) -> None:
    (tmp_path / "training000007").write_text("in the way")
    saved = TrainingState(tmp_path, {"weight": nn.Parameter(torch.ones(3))}, [])
    with pytest.raises(CheckpointException, match="File exists"), saved:
        saved.save(7)


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("puzzle.distributed.state.time.monotonic", lambda: now[0])
    timer = SaveTimer(num_bytes=0)
    spent, steps = 0.0, 0
    for _ in range(2000):
        now[0] += 1.0
        if timer.due():
            with timer.saving():
                now[0] += 10.0
            spent, steps = spent + 10.0, steps + 1
    assert steps > 5
    assert spent <= now[0] / 20 + 10
    assert not SaveTimer(num_bytes=10**12).due()


def test_a_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    parameters = {"weight": nn.Parameter(torch.ones(3))}
    TrainingState(tmp_path, parameters, []).save(7)
    (file,) = tmp_path.glob("training000007/*.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(PuzzleError, match=r"training000007 is damaged.*delete it"):
        TrainingState(tmp_path, parameters, []).restore()
