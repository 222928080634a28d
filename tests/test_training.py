"""The schedule, and training state on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.training import TrainingState, learning_rate, saved_parameters


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, steps=100, peak=2.0, warmup=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def _training(path: Path) -> tuple[dict[str, Tensor], TrainingState, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([matrix], lr=0.1),
        torch.optim.AdamW([vector], lr=0.1, fused=True),
    ]
    parameters: dict[str, Tensor] = {"layer.matrix": matrix, "layer.vector": vector}
    return parameters, TrainingState(path, parameters, *optimizers), optimizers


def _steps(parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        data = torch.full((4,), float(step + 1))
        (parameters["layer.matrix"] @ data - parameters["layer.vector"]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_training_goes_on_as_if_never_cut(tmp_path: Path) -> None:
    whole, _, optimizers = _training(tmp_path / "unused")
    _steps(whole, optimizers, 0, 6)
    cut, state, optimizers = _training(tmp_path / "state.safetensors")
    _steps(cut, optimizers, 0, 3)
    state.save(3)
    _steps(cut, optimizers, 3, 5)  # lost by the kill
    resumed, state, optimizers = _training(tmp_path / "state.safetensors")
    assert state.restore() == 3
    _steps(resumed, optimizers, 3, 6)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_part_of_what_was_saved_goes_on_alone(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    (matrix, vector), moments = _pair(file, "matrix", "vector")
    (resumed,), found = _pair(file, "vector")
    assert torch.equal(resumed, vector)
    assert torch.equal(found[resumed]["exp_avg"], moments[vector]["exp_avg"])
    (fresh, _), found = _pair(file, "matrix", "unknown")
    assert not torch.equal(fresh, matrix)
    assert not found


def _pair(file: Path, *names: str) -> tuple[list[Tensor], dict[Tensor, dict[str, Tensor]]]:
    """Parameters with these names and their moments: restored from the file, which is written if it is not there."""
    parameters = {name: torch.nn.Parameter(torch.zeros(3)) for name in names}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    state = TrainingState(file, parameters, optimizer)
    if file.exists():
        assert state.restore() == (5 if "unknown" not in names else 0)
    else:
        torch.stack([value.sum() for value in parameters.values()]).sum().backward()
        optimizer.step()
        state.save(5)
    return list(parameters.values()), dict(optimizer.state)


@pytest.mark.parametrize("fused", [True, False])
def test_step_counters_are_where_the_optimizer_reads_them(fused: bool, tmp_path: Path) -> None:
    """A fused optimiser's beside the weights, others' on the CPU; a device without memory stands for a GPU."""
    saved = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([saved])
    saved.sum().backward()
    optimizer.step()
    TrainingState(tmp_path / "state.safetensors", {"weight": saved}, optimizer).save(1)
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["fused"] = fused
    assert TrainingState(tmp_path / "state.safetensors", {"weight": parameter}, optimizer).restore() == 1
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_meta
    assert state["step"].is_meta is fused


def test_a_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(b"damaged")
    with pytest.raises(PuzzleError, match="is damaged; delete"):
        saved_parameters(file)
