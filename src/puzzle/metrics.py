"""Quality of a model beside its parent, token by token, without a whole batch's logits ever in memory.

N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from puzzle.modeling import PuzzleForCausalLM

_CHUNK_LOGITS = 2**20
"""Logits of a chunk of tokens: 4 MiB in float32, which stays in a CPU's cache; chunks four times as long took 20 %
longer (4096 words, one core of an AMD EPYC, 2026-11-21)."""
_LARGE_VOCABULARY = 2**12
"""From here on chunks are no shorter than 256 tokens, or reading the head's weights would be what takes the time."""


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
    cosine: Tensor
    """1 - cosine of the final hidden states to the parent's, both after the last norm."""


@torch.no_grad()
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
        reference = _Reference.of(parent.lm_head, parent.model.norm(parent_hidden_ND[rows]))
        for part, hidden_ND in zip(parts, hiddens_ND, strict=True):
            part.append(reference.compare(model.lm_head, model.model.norm(hidden_ND[rows]), targets_N[rows]))
    return [_concatenate(part) for part in parts]


def log_probabilities(model: PuzzleForCausalLM, hidden_ND: Tensor) -> Tensor:
    """Next-token log-probabilities in float32, [N, V], from the output of the last layer."""
    return log_softmax(model.lm_head(model.model.norm(hidden_ND)).float(), dim=-1)


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis small enough for their logits."""
    size = max(1, _CHUNK_LOGITS // min(vocab_size, _LARGE_VOCABULARY))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The parent's side of a chunk, worked out once for all candidates.

    With logits z, their log-sums l and the parent's probabilities p, KL = (l' - l) - E_p[z' - z]. Candidates that share
    the parent's head W have E_p[z' - z] = (p W) . (h' - h), a dot product of size D in place of a sum over V.
    """

    head: nn.Linear
    hidden_ND: Tensor
    """After the final norm."""
    unit_ND: Tensor
    probabilities_NV: Tensor
    mean_row_ND: Tensor
    """p W: the mean row of the head."""
    mean_logit_N1: Tensor
    highest_N1: Tensor
    log_sum_N1: Tensor
    """Of exp(logits - highest): l without the part where float32 would lose small differences."""
    best_N1: Tensor

    @classmethod
    def of(cls, head: nn.Linear, hidden_ND: Tensor) -> "_Reference":
        logits_NV = head(hidden_ND).float()
        highest_N1, best_N1 = logits_NV.max(-1, keepdim=True)
        exponentials_NV = (logits_NV - highest_N1).exp_()
        sum_N1 = exponentials_NV.sum(-1, keepdim=True)
        probabilities_NV = exponentials_NV.div_(sum_N1)
        return cls(
            head=head,
            hidden_ND=hidden_ND,
            unit_ND=normalize(hidden_ND.float(), dim=-1),
            probabilities_NV=probabilities_NV,
            mean_row_ND=probabilities_NV.to(hidden_ND.dtype) @ head.weight,
            mean_logit_N1=(probabilities_NV * logits_NV).sum(-1, keepdim=True),
            highest_N1=highest_N1,
            log_sum_N1=sum_N1.log(),
            best_N1=best_N1,
        )

    def compare(self, head: nn.Linear, hidden_ND: Tensor, targets_N: Tensor) -> TokenMetrics:
        logits_NV = head(hidden_ND).float()
        highest_N1 = logits_NV.amax(-1, keepdim=True)
        asked_N2 = torch.cat([self.best_N1, targets_N.unsqueeze(-1)], dim=-1)
        asked_logits_N2 = logits_NV.gather(-1, asked_N2)
        if head.weight.dtype == torch.float32:
            # Logits of equal size are as good as impossible, and argmax takes 15 times as long as amax.
            likeliest_N2 = asked_logits_N2 == highest_N1
        else:
            likeliest_N2 = asked_N2 == logits_NV.argmax(-1, keepdim=True)
        change_N1 = self._mean_change(head, hidden_ND, logits_NV)
        log_sum_N1 = logits_NV.sub_(highest_N1).exp_().sum(-1, keepdim=True).log_()
        kl_N1 = (highest_N1 - self.highest_N1 - change_N1) + (log_sum_N1 - self.log_sum_N1)
        return TokenMetrics(
            kl=kl_N1.squeeze(-1),
            lm_loss=(highest_N1 - asked_logits_N2[:, 1:] + log_sum_N1).squeeze(-1),
            top1=likeliest_N2[:, 1].float(),
            top1_agreement=likeliest_N2[:, 0].float(),
            # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
            cosine=(normalize(hidden_ND.float(), dim=-1) - self.unit_ND).square().sum(-1) / 2,
        )

    def _mean_change(self, head: nn.Linear, hidden_ND: Tensor, logits_NV: Tensor) -> Tensor:
        """E_p[z' - z], [N, 1]; from the logits themselves where they are rounded or of another head."""
        if head is self.head and head.weight.dtype == torch.float32:
            return ((hidden_ND - self.hidden_ND) * self.mean_row_ND).sum(-1, keepdim=True)
        return (self.probabilities_NV * logits_NV).sum(-1, keepdim=True) - self.mean_logit_N1


def _concatenate(parts: list[TokenMetrics]) -> TokenMetrics:
    names = TokenMetrics.__dataclass_fields__
    return TokenMetrics(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
