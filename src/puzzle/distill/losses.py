"""The losses of global knowledge distillation (paper section 2.5), from hidden states and the head's weight.

p is the parent's and q the child's distribution of the next token, both of logits divided by a temperature t:

    forward   KL(p || q) = sum_i p_i log(p_i / q_i)                         the paper's
    reverse   KL(q || p)
    skewed    KL(p || a p + (1 - a) q)                                      DistiLLM, arXiv 2402.03898
    LM        -log q_y at t = 1, y the token that follows in the text
    cosine    1 - <h, h'> / (|h| |h'|), hidden states after a layer

A divergence is multiplied by t^2, which keeps the size of its gradient (Hinton et al., arXiv 1503.02531). All are means
over tokens.

Shapes: B batch, T tokens, N = B * T, D hidden size, V vocabulary, K tokens kept of a cached distribution.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puzzle.distill.divergences import forward, reverse, skewed

_CHUNK_LOGITS = 2**20
_MIN_CHUNK_TOKENS = 48
"""Logits of 2^20, or of 48 tokens where that is more, are in memory at a time: see benchmarks/distill_loss.md."""
_MIN_CHUNK_TOKENS_GPU = 512
"""A chunk reads the head's weight four times: fewer tokens would not keep a GPU busy. Reckoned, not measured yet."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is asked of the child's next-token distribution; the default is KL(p || q) in nats."""

    divergence: Literal["forward", "reverse", "skewed"] = "forward"
    skew: float = 0.1
    """a of `skewed`, 0 < a < 1."""
    temperature: float = 1.0
    kl_weight: float = 1.0
    """Of the divergence."""
    lm_weight: float = 0.0
    """Of the LM loss."""


@dataclass(frozen=True)
class HeadLosses:
    """Means over tokens, scalars."""

    total: Tensor
    """`kl_weight` times the divergence and `lm_weight` times the LM loss: this one has a gradient."""
    divergence: Tensor
    lm: Tensor
    """0 where it has no weight: it is not computed."""


class Reference(Protocol):
    """What the parent says about the next token."""

    def divergence(self, rows: slice, logits_NV: Tensor, objective: Objective, buffers: "Buffers") -> Tensor:
        """Divergence of each token of a chunk, [N]; `logits_NV` is replaced by its gradient with respect to them."""
        ...


class Buffers:
    """Memory for logits that one chunk leaves to the next: fresh pages would take as long as a pass over them."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._vocab_size, self._dtype, self._device = vocab_size, dtype, device
        self._made: dict[str, Tensor] = {}

    def get(self, name: str, num_tokens: int) -> Tensor:
        """The buffer of this name, [N, V]; the last chunk takes a part of it."""
        if name not in self._made:
            self._made[name] = torch.empty(num_tokens, self._vocab_size, dtype=self._dtype, device=self._device)
        return self._made[name][:num_tokens]


@dataclass(frozen=True)
class ParentHead:
    """The parent's own head on its hidden states after the final norm."""

    hidden_ND: Tensor
    weight_VD: Tensor

    def divergence(self, rows: slice, logits_NV: Tensor, objective: Objective, buffers: Buffers) -> Tensor:
        scratch_NV, logp_NV = (buffers.get(name, len(logits_NV)) for name in ("scratch", "parent"))
        _logits(self.hidden_ND[rows], self.weight_VD, out=scratch_NV)
        torch.log_softmax(scratch_NV.div_(objective.temperature), -1, out=logp_NV)
        logq_NV = torch.log_softmax(logits_NV.div_(objective.temperature), -1, out=scratch_NV)
        match objective.divergence:
            case "forward":
                value_N = forward(logp_NV, logq_NV, out=logits_NV)
            case "reverse":
                value_N = reverse(logp_NV, logq_NV, out=logits_NV)
            case "skewed":
                value_N = skewed(logp_NV, logq_NV, objective.skew, out=logits_NV)
        # t^2 for the value; for the gradient, 1/t of it is that of the division above.
        logits_NV.mul_(objective.temperature)
        return value_N * objective.temperature**2


@dataclass(frozen=True)
class TopTokens:
    """The parent's K likeliest tokens; the others count as one, with the probability that is left.

    The divergence is KL(p || q) of these K + 1, at t = 1: at most that of all tokens.
    """

    ids_NK: Tensor
    log_probabilities_NK: Tensor

    def divergence(self, rows: slice, logits_NV: Tensor, objective: Objective, buffers: Buffers) -> Tensor:
        assert (objective.divergence, objective.temperature) == ("forward", 1), "the recipe allows no other"
        ids_NK, logp_NK = self.ids_NK[rows], self.log_probabilities_NK[rows].to(logits_NV.dtype)
        logq_NV = torch.log_softmax(logits_NV, -1, out=buffers.get("scratch", len(logits_NV)))
        logq_NK = logq_NV.gather(-1, ids_NK)
        q_NV = torch.exp(logq_NV, out=logits_NV)
        p_NK, q_NK = logp_NK.exp(), logq_NK.exp()
        tiny = torch.finfo(logits_NV.dtype).tiny
        p_rest_N1 = (1 - p_NK.sum(-1, keepdim=True)).clamp_min_(0)
        q_rest_N1 = q_NV.scatter_(-1, ids_NK, 0.0).sum(-1, keepdim=True).clamp_min_(tiny)
        q_NV.mul_(1 - p_rest_N1 / q_rest_N1).scatter_(-1, ids_NK, q_NK - p_NK)
        rest_N1 = torch.xlogy(p_rest_N1, p_rest_N1) - p_rest_N1 * q_rest_N1.log()
        return (p_NK * (logp_NK - logq_NK)).sum(-1) + rest_N1.squeeze(-1)


def head_losses(
    hidden_ND: Tensor, weight_VD: Tensor, reference: Reference, targets_N: Tensor, objective: Objective
) -> HeadLosses:
    """Divergence to the parent and LM loss from the child's hidden states after its final norm.

    The head, the losses and their gradients are computed together in the forward pass, in chunks of tokens, so that
    logits never exist for more than a chunk; the backward pass only scales. Under autocast, matrix products are in its
    dtype, everything else in float32.

    Args:
        weight_VD: the head's, tied to the embeddings or not.
        targets_N: the tokens that follow in the text; read only if the LM loss has a weight.
    """
    if not (objective.kl_weight or objective.lm_weight):
        zero = hidden_ND.new_zeros(())
        return HeadLosses(zero, zero, zero)
    wanted = (
        torch.is_grad_enabled() and hidden_ND.requires_grad,
        torch.is_grad_enabled() and weight_VD.requires_grad,
    )
    arguments = (hidden_ND, weight_VD, reference, targets_N, objective, wanted)
    return HeadLosses(*_HeadLosses.apply(*arguments))  # type: ignore[no-untyped-call]


def cosine_loss(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """1 - cosine similarity of the hidden states after one layer, mean over tokens; both stay in their own dtype."""
    loss: Tensor = _Cosine.apply(child_BTD, parent_BTD)  # type: ignore[no-untyped-call]
    return loss


class _HeadLosses(torch.autograd.Function):
    """Gradients of the total come with its value; `backward` scales them in place, so it can be called once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        reference: Reference,
        targets_N: Tensor,
        objective: Objective,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        product = _product_dtype(hidden_ND)
        cast_ND, cast_VD = hidden_ND.to(product), weight_VD.to(product)
        grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        grad_VD = torch.zeros_like(weight_VD) if wanted[1] else None
        sums_2 = torch.zeros(2, dtype=own, device=hidden_ND.device)
        num_tokens, buffers = len(hidden_ND), Buffers(len(weight_VD), own, hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(hidden_ND, len(weight_VD)):
                logits_NV = buffers.get("logits", rows.stop - rows.start)
                _logits(cast_ND[rows], cast_VD, out=logits_NV)
                sums_2 += _chunk(rows, logits_NV, reference, targets_N, objective, buffers)
                gradient_NV = logits_NV.div_(num_tokens).to(product)
                if grad_ND is not None:
                    grad_ND[rows] = gradient_NV @ cast_VD
                if grad_VD is not None:
                    _add_product(grad_VD, gradient_NV.T, cast_ND[rows])
        ctx.gradients = (grad_ND, grad_VD)
        divergence, lm = (sums_2 / num_tokens).unbind()
        ctx.mark_non_differentiable(divergence, lm)
        return objective.kl_weight * divergence + objective.lm_weight * lm, divergence, lm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of head_losses can be asked for once"
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*scaled, None, None, None, None)


def _chunk(
    rows: slice, logits_NV: Tensor, reference: Reference, targets_N: Tensor, objective: Objective, buffers: Buffers
) -> Tensor:
    """Sums of divergence and LM loss over a chunk, [2]; `logits_NV` is replaced by the gradient of the weighted sum."""
    sums_2 = logits_NV.new_zeros(2)
    lm_NV = None
    if objective.lm_weight:
        lm_NV = torch.log_softmax(logits_NV, -1, out=buffers.get("lm", len(logits_NV)))
        targets_N1 = targets_N[rows].unsqueeze(-1)
        sums_2[1] = -lm_NV.gather(-1, targets_N1).sum()
        lm_NV.exp_().scatter_add_(-1, targets_N1, -torch.ones_like(targets_N1, dtype=lm_NV.dtype))
    if objective.kl_weight:
        sums_2[0] = reference.divergence(rows, logits_NV, objective, buffers).sum()
        logits_NV.mul_(objective.kl_weight)
    else:
        logits_NV.zero_()
    if lm_NV is not None:
        logits_NV.add_(lm_NV, alpha=objective.lm_weight)
    return sums_2


class _Cosine(torch.autograd.Function):
    """Keeps both hidden states as they are; what is float32, or normalised, lives for a layer's turn only."""

    @staticmethod
    def forward(ctx: Any, child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(child_BTD, parent_BTD)
        child_unit, parent_unit, _ = _units(child_BTD, parent_BTD)
        # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
        return (child_unit - parent_unit).square().sum(-1).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        child_BTD, parent_BTD = ctx.saved_tensors
        child_unit, parent_unit, norm_BT1 = _units(child_BTD, parent_BTD)
        cosine_BT1 = (child_unit * parent_unit).sum(-1, keepdim=True)
        gradient_BTD = (cosine_BT1 * child_unit - parent_unit) / norm_BT1
        return (gradient_BTD * (scale / norm_BT1.numel())).to(child_BTD.dtype), None


def _units(child_BTD: Tensor, parent_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both at length 1, in float32 at least, and the child's length, [B, T, 1]."""
    own = torch.float64 if child_BTD.dtype == torch.float64 else torch.float32
    norms = [hidden.to(own).norm(dim=-1, keepdim=True).clamp_min(1e-8) for hidden in (child_BTD, parent_BTD)]
    return child_BTD.to(own) / norms[0], parent_BTD.to(own) / norms[1], norms[0]


def _chunks(hidden_ND: Tensor, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis small enough for their logits."""
    least = _MIN_CHUNK_TOKENS if hidden_ND.device.type == "cpu" else _MIN_CHUNK_TOKENS_GPU
    size = max(least, _CHUNK_LOGITS // vocab_size)
    for start in range(0, len(hidden_ND), size):
        yield slice(start, min(start + size, len(hidden_ND)))


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


def _logits(hidden_ND: Tensor, weight_VD: Tensor, out: Tensor) -> None:
    if hidden_ND.dtype == weight_VD.dtype == out.dtype:
        torch.mm(hidden_ND, weight_VD.T, out=out)
    else:
        out.copy_(hidden_ND.to(weight_VD.dtype) @ weight_VD.T)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
