"""The schedule, and training state on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.training import TrainingState, learning_rate


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
