"""Closed forms: the least-squares optimum of every map that is linear in its unknowns, in float64.

Each input's second moment is raised by the share `RIDGE` of itself, as if its activations carried a little independent
noise: that keeps the solve stable where calibration saw fewer directions than there are channels, and does not depend
on the channels' scales, which differ by orders of magnitude.

Shapes: D hidden size, I channels.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]
RIDGE = 1e-3
"""Of a trained 5M Llama, held-out errors are the same within 0.3 % from 1e-5 to 1e-2 at 25 k tokens (2026-11-21)."""
_BATCH_SHARE = 1 / 50
"""Of the channels left, how many are removed at once; see `rank_channels`."""


def ridge(statistics: State, *, bias: bool, rank: int | None = None) -> tuple[list[Tensor], Tensor | None]:
    """The linear map of at most `rank` from normed input h to output y that minimises E||y - W h - b||^2.

    What a map W' loses to the ridge regression W is tr (W - W') M (W - W')^T, M the input's damped second moment: so W'
    is W on the `rank` directions of the output in which W M W^T is largest (Izenman 1975).

    Args:
        statistics: the moments of h and y (`puzzle.library.statistics`); with a bias they are centred first.

    Returns:
        The factors of W: itself, [D, D], or [D, rank] with orthonormal columns and [rank, D]; and b [D] if `bias`.
    """
    second, cross = statistics["input_second_moment"].double(), statistics["cross_moment"].double()
    input_mean, output_mean = statistics["input_mean"].double(), statistics["output_mean"].double()
    # From before centring, which of an input that hardly varies leaves only rounding error.
    added = torch.diag(damping(second))
    if bias:
        second, cross = second - torch.outer(input_mean, input_mean), cross - torch.outer(output_mean, input_mean)
    weight = torch.linalg.solve(second + added, cross.T).T
    factors, mapped_mean = [weight], weight @ input_mean
    if rank is not None:
        explained = weight @ cross.T  # W M W^T, as W M = E[y h^T]
        expand = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:].flip(1)
        factors, mapped_mean = [expand, expand.T @ weight], expand @ (expand.T @ weight @ input_mean)
    return factors, output_mean - mapped_mean if bias else None


def least_squares_update(weight: Tensor, second_moment: Tensor, kept: Tensor) -> Tensor:
    """The projection of the kept inputs S that comes closest to W on all inputs, W C[:, S] C[S, S]^-1, [D, S].

    Written as the kept columns plus what they take over from the dropped ones: with nothing dropped it is W itself, and
    damping draws it to plain slicing, not to zero.

    Args:
        weight: W [D, I]. second_moment: C = E[a a^T], [I, I]. kept: [S], indices into I.
    """
    dropped = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    dropped[kept] = False
    moved = weight[:, dropped] @ second_moment[dropped][:, kept]
    damped = second_moment[kept][:, kept]
    damped.diagonal().add_(damping(second_moment)[kept])
    return (weight[:, kept] + torch.linalg.solve(damped, moved.T).T).contiguous()


def damping(second_moment: Tensor) -> Tensor:
    """What is added to the diagonal of `second_moment` before it is inverted. [I]"""
    never_active = torch.finfo(second_moment.dtype).tiny  # any positive number makes its weight 0
    return (RIDGE * second_moment.diagonal()).clamp_min(never_active)


def rank_channels(down_DI: Tensor, statistics: State, *, iterative: bool) -> Tensor:
    """An FFN's channels, the last to be given up first, so that widths nest (paper section 2.1, appendix A). [I]

    Alone, channel i adds mean|a_i| * ||W[:, i]|| to the output. Or iteratively, by backward elimination: it costs what
    is lost after the other channels took over what they can of it, ||W_i||^2 / [C^-1]_ii, after which W and C^-1 are
    those of the channels left (optimal brain surgeon; Hassibi and Stork 1993). Channels are removed in batches of a
    share of what is left: about 3 I^3 operations whatever the share.

    Args:
        down_DI: the down projection. statistics: `activation_mean_abs` [I], `activation_second_moment` [I, I].
    """
    down_DI = down_DI.double()
    if not iterative:
        alone_I = statistics["activation_mean_abs"].double() * down_DI.norm(dim=0)
        return alone_I.argsort(descending=True, stable=True)
    moment_II = statistics["activation_second_moment"].double()
    moment_II = moment_II + torch.diag(damping(moment_II))
    weight, inverse = _scaled(down_DI, moment_II)
    left = torch.arange(down_DI.shape[1], device=down_DI.device)
    batches = []
    while len(left):
        cost = weight.square().sum(0) / inverse.diagonal()
        order = cost.argsort(stable=True)
        count = max(1, int(len(left) * _BATCH_SHARE))
        gone, kept = order[:count], order[count:].sort().values
        batches.append(left[gone])
        weight, inverse = _without(weight, inverse, gone, kept)
        left = left[kept]
    return torch.cat(batches).flip(0)


def rank_blocks(weight_DI: Tensor, second_moment: Tensor, groups: int, blocks: int) -> Tensor:
    """Blocks of neighbouring inputs of W, in groups: in each group the last to be given up first. [groups, blocks]

    By the elimination of `rank_channels`, in which each group gives up one block at a time: the block g costs
    tr W_g ([C^-1]_gg)^-1 W_g^T, all that is lost by it where W is refitted.
    """
    second_moment = second_moment.double()
    weight, inverse = _scaled(weight_DI.double(), second_moment + torch.diag(damping(second_moment)))
    left, gone_of = torch.arange(groups * blocks, device=weight.device).view(groups, blocks), []
    for _ in range(blocks):
        places = torch.arange(weight.shape[1], device=weight.device).view(*left.shape, -1)
        blocks_GBDC = weight[:, places].movedim(0, 2)
        own_GBCC = inverse[places.unsqueeze(-1), places.unsqueeze(-2)]
        cost = (torch.linalg.solve(own_GBCC, blocks_GBDC.mT) * blocks_GBDC.mT).sum((2, 3))
        gone = torch.zeros_like(left, dtype=torch.bool).scatter_(1, cost.argmin(1, keepdim=True), True)
        gone_of.append(left[gone])
        weight, inverse = _without(weight, inverse, places[gone].flatten(), places[~gone].flatten())
        left = left[~gone].view(groups, -1)
    return torch.stack(gone_of[::-1], dim=1) % blocks


def _scaled(weight_DI: Tensor, moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and inverse moment of channels whose scales, which differ by orders of magnitude, were made one."""
    scale_I = moment_II.diagonal().sqrt()
    return weight_DI * scale_I, torch.cholesky_inverse(torch.linalg.cholesky(moment_II / torch.outer(scale_I, scale_I)))


def _without(weight: Tensor, inverse: Tensor, gone: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What the kept channels are with what they take over, and their own inverse moment: the Schur complement."""
    share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
    return weight[:, kept] - weight[:, gone] @ share, inverse[kept][:, kept] - inverse[kept][:, gone] @ share
