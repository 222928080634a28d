"""Closed forms: the least-squares optimum of every map that is linear in its unknowns.

All are solved in float64 with a ridge of `RIDGE` times the mean of the diagonal, which keeps the solve stable where
calibration saw fewer directions than there are channels.
"""

import torch
from torch import Tensor

from puzzle.blocks.variants import State

RIDGE = 1e-3


def ridge(statistics: State, name: str, *, bias: bool, dtype: torch.dtype) -> State:
    """The linear map from the normed input h to the contribution y that minimises E||y - W h - b||^2.

    Args:
        statistics: `input_mean` [D], `input_second_moment` [D, D] = E[h h^T], `output_mean` [D],
            `cross_moment` [D, D] = E[y h^T].
        name: the linear module the result is named for.
        bias: with a bias, the moments are centred first.
    """
    second, cross = statistics["input_second_moment"].double(), statistics["cross_moment"].double()
    input_mean, output_mean = statistics["input_mean"].double(), statistics["output_mean"].double()
    if bias:
        second = second - torch.outer(input_mean, input_mean)
        cross = cross - torch.outer(output_mean, input_mean)
    weight = torch.linalg.solve(_damped(second), cross.T).T
    state = {f"{name}.weight": weight.to(dtype).contiguous()}
    if bias:
        state[f"{name}.bias"] = (output_mean - weight @ input_mean).to(dtype)
    return state


def refit(weight: Tensor, second_moment: Tensor, kept: Tensor) -> Tensor:
    """The projection of the kept inputs that comes closest to `weight` on all of them: W C[:, S] C[S, S]^-1.

    Args:
        weight: [D, I]. second_moment: [I, I], C = E[a a^T]. kept: [S], indices into I.

    Returns:
        [D, S].
    """
    target = weight @ second_moment[:, kept]
    return torch.linalg.solve(_damped(second_moment[kept][:, kept]), target.T).T.contiguous()


def _damped(second_moment: Tensor) -> Tensor:
    damping = RIDGE * second_moment.diagonal().mean().clamp_min(torch.finfo(second_moment.dtype).tiny)
    return second_moment + damping * torch.eye(len(second_moment), dtype=second_moment.dtype)
