"""Quality of models beside their parent, token by token, without a whole batch's logits ever in memory.

Logits are float32 whatever the weights are: rounded to bfloat16 they have steps of 0.125 at 16 to 32, which alone is a
KL of 3e-4 to 1e-3 nats, as much as what mild replacements do.

Shapes: A candidates, N tokens, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from puzzle.device import float32_operand, float32_product, logits_at_once
from puzzle.modeling import PuzzleForCausalLM, capped

_MIN_CHUNK_TOKENS = 256
"""Fewer, and reading the head's weights would be what takes the time."""


class TokenMetrics(NamedTuple):
    """Per candidate and token, each of shape [A, N]."""

    kl: Tensor
    """KL(parent || model) of the next-token distributions, nats."""
    lm_loss: Tensor
    """Negative log-likelihood of the true next token, nats."""
    top1: Tensor
    """1 where the likeliest token is the true one."""
    top1_agreement: Tensor
    """1 where the likeliest token is the parent's likeliest."""
    cosine: Tensor
    """1 - cosine of the final hidden states to the parent's, both after the last norm."""


@torch.no_grad()
def compare(
    parent: PuzzleForCausalLM,
    model: PuzzleForCausalLM,
    parent_hidden_ND: Tensor,
    hiddens_AND: Tensor,
    targets_N: Tensor,
) -> TokenMetrics:
    """Metrics of several candidates that share one final norm and head.

    Args:
        parent: whose final norm and head apply to `parent_hidden_ND`.
        model: whose final norm and head apply to the candidates; the parent itself where only inner blocks differ.
        parent_hidden_ND: the parent's output of the last layer, before the final norm.
        hiddens_AND: each candidate's.
        targets_N: the true next tokens.
    """
    size = max(_MIN_CHUNK_TOKENS, logits_at_once(targets_N.device) // parent.config.vocab_size)
    chunks = zip(parent_hidden_ND.split(size), hiddens_AND.split(size, 1), targets_N.split(size), strict=True)
    own_VD = head_VD = float32_operand(parent.lm_head.weight)
    if model is not parent:
        head_VD = float32_operand(model.lm_head.weight)
    parts = [_compare_chunk(parent, model, own_VD, head_VD, *chunk) for chunk in chunks]
    return TokenMetrics(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _compare_chunk(
    parent: PuzzleForCausalLM,
    model: PuzzleForCausalLM,
    own_VD: Tensor,
    head_VD: Tensor,
    parent_hidden_ND: Tensor,
    hiddens_AND: Tensor,
    targets_N: Tensor,
) -> TokenMetrics:
    """The parent's side is worked out once for all candidates, of which as many go together as logits fit.

    With logits z, their log-sums l and the parent's probabilities p, KL = (l' - l) - E_p[z' - z]. Candidates that share
    the parent's head W, and have no cap of logits, have E_p[z' - z] = (p W) . (h' - h), a dot product of size D in
    place of a sum over V.
    """
    own_ND = parent.final_norm(parent_hidden_ND).to(own_VD.dtype)
    own_logits_NV = capped(float32_product(own_ND, own_VD), parent.cap)
    own_highest_N1, own_best_N1 = own_logits_NV.max(-1, keepdim=True)
    exponentials_NV = (own_logits_NV - own_highest_N1).exp_()
    sum_N1 = exponentials_NV.sum(-1, keepdim=True)
    # Of exp(logits - highest): l without the part where float32 would lose small differences.
    own_log_sum_N1 = sum_N1.log()
    probabilities_NV = exponentials_NV.div_(sum_N1)
    shared = model is parent and parent.cap is None
    mean_row_ND = probabilities_NV @ own_VD.to(probabilities_NV.dtype) if shared else None
    asked_N2 = torch.cat([own_best_N1, targets_N.unsqueeze(-1)], dim=-1)
    parts = []
    for some_AND in hiddens_AND.split(max(1, logits_at_once(targets_N.device) // own_logits_NV.numel())):
        normed_AND = model.final_norm(some_AND).to(head_VD.dtype)
        logits_NV = capped(float32_product(normed_AND.flatten(0, 1), head_VD), model.cap)
        logits_ANV = logits_NV.unflatten(0, normed_AND.shape[:2])
        highest_AN1 = logits_ANV.amax(-1, keepdim=True)
        asked_logits_AN2 = logits_ANV.gather(-1, asked_N2.expand(len(logits_ANV), -1, -1))
        # float32 logits of equal size are as good as impossible, and argmax takes 15 times as long as amax.
        likeliest_AN2 = (asked_logits_AN2 == highest_AN1).float()
        if mean_row_ND is not None:
            change_AN1 = ((normed_AND.to(mean_row_ND.dtype) - own_ND) * mean_row_ND).sum(-1, keepdim=True)
        else:
            change_AN1 = (probabilities_NV * (logits_ANV - own_logits_NV)).sum(-1, keepdim=True)
        log_sum_AN1 = logits_ANV.sub_(highest_AN1).exp_().sum(-1, keepdim=True).log_()
        kl_AN1 = (highest_AN1 - own_highest_N1 - change_AN1) + (log_sum_AN1 - own_log_sum_N1)
        unit_AND, own_unit_ND = normalize(normed_AND.float(), dim=-1), normalize(own_ND.float(), dim=-1)
        # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
        cosine_AN = (unit_AND - own_unit_ND).square().sum(-1) / 2
        lm_loss_AN = (highest_AN1 - asked_logits_AN2[..., 1:] + log_sum_AN1).squeeze(-1)
        agreement_AN, top1_AN = likeliest_AN2.unbind(-1)
        parts.append(TokenMetrics(kl_AN1.squeeze(-1), lm_loss_AN, top1_AN, agreement_AN, cosine_AN))
    return TokenMetrics(*(torch.cat(part) for part in zip(*parts, strict=True)))
