"""Quality of a model beside its parent, token by token, without a whole batch's logits ever in memory.

N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from puzzle.modeling import PuzzleForCausalLM

_CHUNK_LOGITS = 2**24
"""Logits in memory at a time: 64 MiB in float32, 128 tokens of a vocabulary of 128k."""


@dataclass(frozen=True, kw_only=True)
class TokenMetrics:
    """Per token, each of shape [N]."""

    kl: Tensor
    """KL(parent || model) of the next-token distributions, nats."""
    lm_loss: Tensor
    """Negative log-likelihood of the true next token, nats."""
    top1: Tensor
    """1 where the likeliest token is the true one."""
    top1_agreement: Tensor
    """1 where the likeliest token is the parent's likeliest."""


def compare(
    parent: PuzzleForCausalLM,
    model: PuzzleForCausalLM,
    parent_hidden_ND: Tensor,
    hiddens_ND: list[Tensor],
    targets_N: Tensor,
) -> list[TokenMetrics]:
    """Metrics of several candidates that share one final norm and head.

    Args:
        parent: whose final norm and head apply to `parent_hidden_ND`.
        model: whose final norm and head apply to the candidates; the parent itself where only inner blocks differ.
        parent_hidden_ND: the parent's output of the last layer, before the final norm.
        hiddens_ND: each candidate's.
        targets_N: the true next tokens.
    """
    parts: list[list[TokenMetrics]] = [[] for _ in hiddens_ND]
    for rows in chunks(len(targets_N), parent.config.vocab_size):
        parent_logp_NV = log_probabilities(parent, parent_hidden_ND[rows])
        for part, hidden_ND in zip(parts, hiddens_ND, strict=True):
            part.append(token_metrics(parent_logp_NV, log_probabilities(model, hidden_ND[rows]), targets_N[rows]))
    return [_concatenate(part) for part in parts]


def log_probabilities(model: PuzzleForCausalLM, hidden_ND: Tensor) -> Tensor:
    """Next-token log-probabilities in float32, [N, V], from the output of the last layer."""
    return log_softmax(model.lm_head(model.model.norm(hidden_ND)).float(), dim=-1)


def token_metrics(parent_logp_NV: Tensor, logp_NV: Tensor, targets_N: Tensor) -> TokenMetrics:
    best_N = logp_NV.argmax(-1)
    return TokenMetrics(
        kl=kl_div(logp_NV, parent_logp_NV, log_target=True, reduction="none").sum(-1),
        lm_loss=cross_entropy(logp_NV, targets_N, reduction="none"),
        top1=(best_N == targets_N).float(),
        top1_agreement=(best_N == parent_logp_NV.argmax(-1)).float(),
    )


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis small enough for their logits."""
    size = max(1, _CHUNK_LOGITS // vocab_size)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _concatenate(parts: list[TokenMetrics]) -> TokenMetrics:
    names = TokenMetrics.__dataclass_fields__
    return TokenMetrics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
