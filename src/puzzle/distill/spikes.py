"""Steps that would do harm: a loss or gradient that is not finite, or far above what it was of late."""

import math

import torch
from torch import Tensor

_WINDOW = 64
_LEAST = 16
"""Steps seen before anything counts as far above."""
_LOSS_FACTOR = 3.0
_NORM_FACTOR = 10.0
"""Times the running median; smaller excesses are what clipping is for. As skipping by the median in Ling (arXiv
2503.05139), with factors of our own: a distillation loss wavers by tens of per cent, its gradient norm by a factor."""
MAX_SKIPS = 10


class SpikeGuard:
    """Says which steps to skip; what it remembers is a tensor, saved and restored with the training."""

    def __init__(self) -> None:
        self.memory = torch.full((2, _WINDOW + 1), math.nan, dtype=torch.float64)
        """Losses and gradient norms of the last accepted steps; the last column starts with the skips in a row."""
        self.clear()

    @property
    def skips(self) -> int:
        """Steps skipped in a row."""
        return int(self.memory[0, -1])

    def clear(self) -> None:
        """Forget: what comes now is of another scale."""
        self.memory.fill_(math.nan)
        self.memory[:, -1] = 0

    def admits(self, loss: float, norm: float) -> bool:
        """Whether to take a step of this loss and gradient norm."""
        found = torch.tensor([loss, norm], dtype=torch.float64)
        if not self._is_usual(found):
            self.memory[0, -1] += 1
            return False
        self.memory[:, :_WINDOW] = self.memory[:, :_WINDOW].roll(-1, dims=1)
        self.memory[:, _WINDOW - 1] = found
        self.memory[0, -1] = 0
        return True

    def _is_usual(self, found: Tensor) -> bool:
        if not found.isfinite().all():
            return False
        history = self.memory[:, :_WINDOW]
        if int(history[0].isfinite().sum()) < _LEAST:
            return True
        limits = history.nanmedian(dim=1).values * torch.tensor([_LOSS_FACTOR, _NORM_FACTOR], dtype=torch.float64)
        return bool((found <= limits).all())
