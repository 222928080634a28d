"""Quality of models beside their parent, token by token, without a whole batch's logits ever in memory.

Logits are float32 whatever the weights are: rounded to bfloat16 they have steps of 0.125 at 16 to 32, which alone is a
KL of 3e-4 to 1e-3 nats, as much as what mild replacements do.

Shapes: A candidates, N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from puzzle.device import float32_operand, float32_product, logits_at_once
from puzzle.modeling import PuzzleForCausalLM

_CHUNK_LOGITS = 2**20
"""Of a chunk of tokens: 4 MiB in float32 stay in a CPU's cache; chunks four times as long took 20 % longer (4096 words,
one core of an AMD EPYC, 2026-11-21)."""
_LARGE_VOCABULARY = 2**12
"""From here on chunks are no shorter than 256 tokens, or reading the head's weights would be what takes the time."""


@dataclass(frozen=True, kw_only=True)
class TokenMetrics:
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

    @classmethod
    def cat(cls, parts: list["TokenMetrics"], dim: int) -> "TokenMetrics":
        names = cls.__dataclass_fields__
        return cls(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name in names})


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
    own, vocab_size = _Head(parent), parent.config.vocab_size
    head = own if model is parent else _Head(model)
    parts = []
    for rows in chunks(len(targets_N), vocab_size):
        reference = _Reference.of(own, parent_hidden_ND[rows], exact=head is own and own.exact)
        at_once = max(1, logits_at_once(targets_N.device) // (len(targets_N[rows]) * vocab_size))
        some = [reference.compare(head, each[:, rows], targets_N[rows]) for each in hiddens_AND.split(at_once)]
        parts.append(TokenMetrics.cat(some, 0))
    return TokenMetrics.cat(parts, 1)


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis small enough for their logits."""
    size = max(1, _CHUNK_LOGITS // min(vocab_size, _LARGE_VOCABULARY))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


class _Head:
    """A model's final norm, and its head with logits in float32."""

    def __init__(self, model: PuzzleForCausalLM) -> None:
        self._norm, self.weight_VD = model.final_norm, float32_operand(model.lm_head.weight)
        self.exact = self.weight_VD.dtype == torch.float32

    def normed(self, hidden_ND: Tensor) -> Tensor:
        """What is multiplied with the weights, in their dtype."""
        return self._norm(hidden_ND).to(self.weight_VD.dtype)

    def logits(self, normed_ND: Tensor) -> Tensor:
        """Of any number of leading dimensions."""
        return float32_product(normed_ND.flatten(0, -2), self.weight_VD).unflatten(0, normed_ND.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The parent's side of a chunk, worked out once for all candidates.

    With logits z, their log-sums l and the parent's probabilities p, KL = (l' - l) - E_p[z' - z]. Candidates that share
    the parent's float32 head W have E_p[z' - z] = (p W) . (h' - h), a dot product of size D in place of a sum over V.
    """

    normed_ND: Tensor
    probabilities_NV: Tensor
    logits_NV: Tensor
    mean_row_ND: Tensor | None
    """p W, the mean row of the head; None where candidates have another head, or logits that are not its products."""
    highest_N1: Tensor
    log_sum_N1: Tensor
    """Of exp(logits - highest): l without the part where float32 would lose small differences."""
    best_N1: Tensor

    @classmethod
    def of(cls, head: _Head, hidden_ND: Tensor, *, exact: bool) -> "_Reference":
        normed_ND = head.normed(hidden_ND)
        logits_NV = head.logits(normed_ND)
        highest_N1, best_N1 = logits_NV.max(-1, keepdim=True)
        exponentials_NV = (logits_NV - highest_N1).exp_()
        sum_N1 = exponentials_NV.sum(-1, keepdim=True)
        probabilities_NV = exponentials_NV.div_(sum_N1)
        return cls(
            normed_ND=normed_ND,
            probabilities_NV=probabilities_NV,
            logits_NV=logits_NV,
            mean_row_ND=probabilities_NV @ head.weight_VD if exact else None,
            highest_N1=highest_N1,
            log_sum_N1=sum_N1.log(),
            best_N1=best_N1,
        )

    def compare(self, head: _Head, hidden_AND: Tensor, targets_N: Tensor) -> TokenMetrics:
        normed_AND = head.normed(hidden_AND)
        logits_ANV = head.logits(normed_AND)
        highest_AN1 = logits_ANV.amax(-1, keepdim=True)
        asked_N2 = torch.cat([self.best_N1, targets_N.unsqueeze(-1)], dim=-1)
        asked_logits_AN2 = logits_ANV.gather(-1, asked_N2.expand(len(logits_ANV), -1, -1))
        # float32 logits of equal size are as good as impossible, and argmax takes 15 times as long as amax.
        likeliest_AN2 = (asked_logits_AN2 == highest_AN1).float()
        if self.mean_row_ND is not None:
            change_AN1 = ((normed_AND - self.normed_ND) * self.mean_row_ND).sum(-1, keepdim=True)
        else:
            change_AN1 = (self.probabilities_NV * (logits_ANV - self.logits_NV)).sum(-1, keepdim=True)
        log_sum_AN1 = logits_ANV.sub_(highest_AN1).exp_().sum(-1, keepdim=True).log_()
        kl_AN1 = (highest_AN1 - self.highest_N1 - change_AN1) + (log_sum_AN1 - self.log_sum_N1)
        unit_AND, parent_unit_ND = normalize(normed_AND.float(), dim=-1), normalize(self.normed_ND.float(), dim=-1)
        return TokenMetrics(
            kl=kl_AN1.squeeze(-1),
            lm_loss=(highest_AN1 - asked_logits_AN2[..., 1:] + log_sum_AN1).squeeze(-1),
            top1=likeliest_AN2[..., 1],
            top1_agreement=likeliest_AN2[..., 0],
            # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
            cosine=(unit_AND - parent_unit_ND).square().sum(-1) / 2,
        )
