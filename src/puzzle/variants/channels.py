"""Rankings of an FFN's channels: which of them a narrower FFN keeps (paper section 2.1, appendix A).

A narrower FFN of I' channels keeps the first I' of one ranking, so that its widths nest. With a the activation,
C = E[a a^T] damped, and W the down projection, the rankings are

- independent: each channel by what it adds alone, mean|a_i| * ||W[:, i]||;
- iterative, by backward elimination, where each choice knows what is gone already:
    - slicing: removing the set S costs E||sum_{i in S} W_i a_i||^2 = sum_{i,j in S} G_ij with G = (W^T W) * C;
    - with refit: the others take over what they can of a removed channel. Channel i then costs ||W_i||^2 / [C^-1]_ii,
      after which W and C^-1 are those of the channels left (optimal brain surgeon; Hassibi and Stork 1993).

Shapes: D hidden size, I channels.
"""

import torch
from torch import Tensor

from puzzle.variants.least_squares import damping

_BATCH_SHARE = 1 / 50
"""Of the channels left, how many are removed at once; see `_eliminate_with_refit`."""


def rank_channels(
    down_DI: Tensor,
    mean_abs_I: Tensor,
    second_moment_II: Tensor,
    *,
    knowing_the_gone: bool,
    with_refit: bool,
) -> Tensor:
    """Channel indices, the last to be given up first. [I]

    Args:
        down_DI: weight of the down projection.
        mean_abs_I: E|a|. second_moment_II: E[a a^T].
        knowing_the_gone: iterative, not independent.
        with_refit: whether the down projection is refitted to the channels left.
    """
    down_DI = down_DI.double()
    if not knowing_the_gone:
        contribution_I = mean_abs_I.double() * down_DI.norm(dim=0)
        return contribution_I.argsort(descending=True, stable=True)
    moment_II = second_moment_II.double()
    moment_II = moment_II + torch.diag(damping(moment_II))
    removed = _eliminate_with_refit(down_DI, moment_II) if with_refit else _eliminate_slices(down_DI, moment_II)
    return removed.flip(0)


def _eliminate_slices(down_DI: Tensor, moment_II: Tensor) -> Tensor:
    """Channels in the order of their removal, each the one whose removal adds least to the error. [I]

    D I^2 operations for G, and I for every removal.
    """
    errors_II = down_DI.T @ down_DI * moment_II
    added_I = errors_II.diagonal().clone()
    removed = torch.empty(len(added_I), dtype=torch.long, device=down_DI.device)
    for step in range(len(removed)):
        channel = added_I.argmin()
        removed[step] = channel
        added_I += 2 * errors_II[channel]
        added_I[channel] = torch.inf
    return removed


def _eliminate_with_refit(down_DI: Tensor, moment_II: Tensor) -> Tensor:
    """Channels in the order of their removal, by what their removal costs after the others took over. [I]

    Removed in batches of a share of what is left, which costs about 3 I^3 operations whatever the share: 2 I^3 to
    invert, 2/3 I^3 to update the inverse; a smaller share only reads it more often. For I = 14336 that is 9e12
    operations, and 5 GB for the inverse and its copies.
    """
    scale_I = moment_II.diagonal().sqrt()  # of channels whose scales differ by orders of magnitude
    weight = down_DI * scale_I
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment_II / torch.outer(scale_I, scale_I)))
    left = torch.arange(len(scale_I), device=down_DI.device)
    batches = []
    while len(left):
        cost = weight.square().sum(0) / inverse.diagonal()
        order = cost.argsort(stable=True)
        count = max(1, int(len(left) * _BATCH_SHARE))
        gone, kept = order[:count], order[count:].sort().values
        batches.append(left[gone])
        # What the kept ones take over, and their own inverse second moment: the Schur complement.
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        weight = weight[:, kept] - weight[:, gone] @ share
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ share
        left = left[kept]
    return torch.cat(batches)
