"""Divergences of log p, the parent's, and log q, the child's, with their gradients with respect to the child's logits.

All work in the memory they are given, three times that of the logits; see `losses` for the formulas and their sources.

Shapes: N tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor


def forward(logp_NV: Tensor, logq_NV: Tensor, out: Tensor) -> Tensor:
    """KL(p || q), [N]; the gradient q - p goes to `out`, the inputs are overwritten.

    From log q - log p and not as a difference of entropies, which would lose what a child nearly like its parent has.
    """
    difference_NV = torch.sub(logq_NV, logp_NV, out=out)
    p_NV = logp_NV.exp_()
    value_N = -_dot(p_NV, difference_NV)
    torch.sub(logq_NV.exp_(), p_NV, out=out)
    return value_N


def reverse(logp_NV: Tensor, logq_NV: Tensor, out: Tensor) -> Tensor:
    """KL(q || p), [N]; the gradient q (log(q / p) - KL) goes to `out`, the inputs are overwritten."""
    difference_NV = torch.sub(logq_NV, logp_NV, out=out)
    q_NV = logq_NV.exp_()
    value_N = _dot(q_NV, difference_NV)
    difference_NV.sub_(value_N.unsqueeze(-1)).mul_(q_NV)
    return value_N


def skewed(logp_NV: Tensor, logq_NV: Tensor, skew: float, out: Tensor) -> Tensor:
    """KL(p || m), m = a p + (1 - a) q, [N]; the gradient -(1 - a) q (p / m - sum_i q_i p_i / m_i) goes to `out`.

    p / m is at most 1 / a, however small both are: it is worked out of logarithms. The inputs are overwritten.
    """
    log_skew, log_rest = math.log(skew), math.log1p(-skew)
    torch.logaddexp(logp_NV.add_(log_skew), logq_NV.add_(log_rest), out=out)
    log_ratio_NV = torch.sub(logp_NV.sub_(log_skew), out, out=out)
    value_N = _dot(logp_NV.exp_(), log_ratio_NV)
    ratio_NV, q_NV = log_ratio_NV.exp_(), logq_NV.sub_(log_rest).exp_()
    ratio_NV.sub_(_dot(q_NV, ratio_NV).unsqueeze(-1)).mul_(q_NV).mul_(skew - 1)
    return value_N


def _dot(left_NV: Tensor, right_NV: Tensor) -> Tensor:
    """Row by row, [N], without the product in memory."""
    return torch.bmm(left_NV.unsqueeze(1), right_NV.unsqueeze(2)).flatten()
