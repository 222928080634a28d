"""The losses of global knowledge distillation (paper section 2.5), from hidden states and the head's weight.

With the parent's distribution p of the next token and the child's q, means over tokens of

    KL        KL(p || q) = sum_i p_i log(p_i / q_i)
    LM        -log q_y, y the token that follows in the text
    cosine    1 - <h, h'> / (|h| |h'|), hidden states after a layer

Shapes: B batch, T tokens, N = B * T, D hidden size, V vocabulary, K tokens kept of a cached distribution.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from puzzle.device import autocast, compiled, float32_operand, float32_product, logits_at_once, product_dtype
from puzzle.modeling import capped

_MIN_CHUNK_TOKENS = 48
"""A chunk reads the head's weight four times, so fewer tokens take longer: see benchmarks/distill_loss.md."""

KL = Callable[[slice, Tensor], Tensor]
"""KL of each token in a slice of the batch, [N], from the child's log-probabilities of them, [N, V]; differentiable."""


def kl_to_head(parent_ND: Tensor, weight_VD: Tensor, cap: float | None = None) -> KL:
    """The KL to the parent, from its hidden states after the final norm and its head, whose logits may be capped."""
    operand_VD = float32_operand(weight_VD.to(product_dtype(weight_VD)))

    def kl(rows: slice, logq_NV: Tensor) -> Tensor:
        logp_NV = log_softmax(capped(float32_product(parent_ND[rows], operand_VD), cap), -1)
        return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)

    return kl


def kl_to_top_tokens(ids_NK: Tensor, logp_NK: Tensor) -> KL:
    """The KL to the parent's K likeliest tokens, all others counting as one: at most the KL of all tokens."""

    def kl(rows: slice, logq_NV: Tensor) -> Tensor:
        own_ids_NK, own_logp_NK = ids_NK[rows], logp_NK[rows].to(logq_NV.dtype)
        p_NK = own_logp_NK.exp()
        p_rest_N = (1 - p_NK.sum(-1)).clamp_min(0)
        q_rest_N = logq_NV.exp().scatter(-1, own_ids_NK, 0.0).sum(-1).clamp_min(torch.finfo(logq_NV.dtype).tiny)
        kept_N = (p_NK * (own_logp_NK - logq_NV.gather(-1, own_ids_NK))).sum(-1)
        return kept_N + torch.xlogy(p_rest_N, p_rest_N) - p_rest_N * q_rest_N.log()

    return kl


def head_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    kl: KL,
    targets_N: Tensor,
    *,
    kl_weight: float,
    lm_weight: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL to the parent and LM loss from the child's hidden states after its final norm.

    The head, the losses and their gradients are computed together in the forward pass, in chunks of tokens, so that
    logits never exist for more than a chunk; the backward pass only scales. Matrices are multiplied in autocast's
    dtype, logits are float32.

    Args:
        weight_VD: the head's, tied to the embeddings or not.
        targets_N: the tokens that follow in the text.
        cap: what the child's logits are bounded by, if they are.

    Returns:
        The weighted sum with its gradient, KL and LM loss, means over tokens; 0 for what has no weight.
    """
    if not (kl_weight or lm_weight):
        return hidden_ND.new_zeros(()), hidden_ND.new_zeros(()), hidden_ND.new_zeros(())
    wanted = [torch.is_grad_enabled() and value.requires_grad for value in (hidden_ND, weight_VD)]
    arguments = hidden_ND, weight_VD, kl, targets_N, (kl_weight, lm_weight), wanted, cap
    total, kl_mean, lm_mean = _HeadLosses.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, kl_mean, lm_mean


class _HeadLosses(torch.autograd.Function):
    """Gradients of the total come with its value; `backward` scales them in place, so it can be called once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        kl: KL,
        targets_N: Tensor,
        weights: tuple[float, float],
        wanted: list[bool],
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        product, num_tokens = product_dtype(hidden_ND), len(hidden_ND)
        cast_ND, cast_VD = hidden_ND.to(product), weight_VD.to(product)
        operand_VD = float32_operand(cast_VD)
        grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        grad_VD = torch.zeros_like(weight_VD) if wanted[1] else None
        own = torch.promote_types(hidden_ND.dtype, torch.float32)
        weights_2 = torch.tensor(weights, dtype=own, device=hidden_ND.device)
        sums_2, zero = torch.zeros_like(weights_2), weights_2.new_zeros(())
        size = max(_MIN_CHUNK_TOKENS, logits_at_once(hidden_ND.device) // len(weight_VD))
        with autocast(hidden_ND.device, torch.float32):
            for start in range(0, num_tokens, size):
                rows = slice(start, min(start + size, num_tokens))
                logits_NV = float32_product(cast_ND[rows], operand_VD).requires_grad_(any(wanted))
                with torch.set_grad_enabled(any(wanted)):
                    logq_NV = log_softmax(capped(logits_NV, cap), -1)
                    lm = -logq_NV.gather(-1, targets_N[rows].unsqueeze(-1)).sum() if weights[1] else zero
                    found_2 = torch.stack([kl(rows, logq_NV).sum() if weights[0] else zero, lm])
                    total = (weights_2 * found_2).sum() / num_tokens
                sums_2 += found_2.detach()
                if not any(wanted):
                    continue
                gradient_NV = torch.autograd.grad(total, logits_NV)[0].to(product)
                if grad_ND is not None:
                    grad_ND[rows] = gradient_NV @ cast_VD
                if grad_VD is not None and grad_VD.dtype == product:
                    grad_VD.addmm_(gradient_NV.T, cast_ND[rows])
                elif grad_VD is not None:
                    grad_VD += gradient_NV.T @ cast_ND[rows]
        ctx.gradients = (grad_ND, grad_VD)
        means_2 = sums_2 / num_tokens
        kl_mean, lm_mean = means_2.unbind()
        ctx.mark_non_differentiable(kl_mean, lm_mean)
        return (weights_2 * means_2).sum(), kl_mean, lm_mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of head_losses can be asked for once"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(scale) for gradient in gradients), *[None] * 5)


def cosine_loss(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """1 - cosine similarity of the hidden states after one layer, mean over tokens; both stay in their own dtype."""
    loss: Tensor = _Cosine.apply(child_BTD, parent_BTD)  # type: ignore[no-untyped-call]
    return loss


class _Cosine(torch.autograd.Function):
    """Keeps both hidden states as they are: autograd would keep 1.6 times as much, and take 1.5 times as long."""

    @staticmethod
    def forward(ctx: Any, child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(child_BTD, parent_BTD)
        return _distance(child_BTD.detach(), parent_BTD)  # a compiler warns of the history that a tensor has

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        return _gradient(*(saved.detach() for saved in ctx.saved_tensors), scale), None


@compiled
def _distance(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    child_unit, parent_unit, _ = _units(child_BTD, parent_BTD)
    # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
    return (child_unit - parent_unit).square().sum(-1).mean() / 2


@compiled
def _gradient(child_BTD: Tensor, parent_BTD: Tensor, scale: Tensor) -> Tensor:
    """Of the distance to the child's hidden states."""
    child_unit, parent_unit, norm_BT1 = _units(child_BTD, parent_BTD)
    cosine_BT1 = (child_unit * parent_unit).sum(-1, keepdim=True)
    gradient_BTD = (cosine_BT1 * child_unit - parent_unit) / norm_BT1
    return (gradient_BTD * (scale / norm_BT1.numel())).to(child_BTD.dtype)


def _units(child_BTD: Tensor, parent_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both at length 1, in float32 at least, and the child's length, [B, T, 1]."""
    own = torch.promote_types(child_BTD.dtype, torch.float32)
    norms = [hidden.to(own).norm(dim=-1, keepdim=True).clamp_min(1e-8) for hidden in (child_BTD, parent_BTD)]
    return child_BTD.to(own) / norms[0], parent_BTD.to(own) / norms[1], norms[0]
