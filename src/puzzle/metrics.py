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
    vocab_size, parts = parent.config.vocab_size, []
    own_VD = head_VD = float32_operand(parent.lm_head.weight)
    if model is not parent:
        head_VD = float32_operand(model.lm_head.weight)
    for rows in chunks(len(targets_N), vocab_size):
        normed_ND = parent.final_norm(parent_hidden_ND[rows]).to(own_VD.dtype)
        reference = _Reference(normed_ND, own_VD, shared=model is parent and own_VD.dtype == torch.float32)
        at_once = max(1, logits_at_once(targets_N.device) // (len(targets_N[rows]) * vocab_size))
        normed = (model.final_norm(some_AND[:, rows]).to(head_VD.dtype) for some_AND in hiddens_AND.split(at_once))
        parts.append(TokenMetrics.cat([reference.compare(each, head_VD, targets_N[rows]) for each in normed], 0))
    return TokenMetrics.cat(parts, 1)


def chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the token axis small enough for their logits."""
    size = max(1, _CHUNK_LOGITS // min(vocab_size, _LARGE_VOCABULARY))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


class _Reference:
    """The parent's side of a chunk, worked out once for all candidates.

    With logits z, their log-sums l and the parent's probabilities p, KL = (l' - l) - E_p[z' - z]. Candidates that share
    the parent's float32 head W have E_p[z' - z] = (p W) . (h' - h), a dot product of size D in place of a sum over V.

    Args:
        shared: whether candidates have this head, and logits are its products.
    """

    def __init__(self, normed_ND: Tensor, weight_VD: Tensor, *, shared: bool) -> None:
        self._normed_ND, self._logits_NV = normed_ND, float32_product(normed_ND, weight_VD)
        self._highest_N1, self._best_N1 = self._logits_NV.max(-1, keepdim=True)
        exponentials_NV = (self._logits_NV - self._highest_N1).exp_()
        sum_N1 = exponentials_NV.sum(-1, keepdim=True)
        # Of exp(logits - highest): l without the part where float32 would lose small differences.
        self._log_sum_N1 = sum_N1.log()
        self._probabilities_NV = exponentials_NV.div_(sum_N1)
        self._mean_row_ND = self._probabilities_NV @ weight_VD if shared else None

    def compare(self, normed_AND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> TokenMetrics:
        """The metrics of candidates by what enters their head."""
        logits_ANV = float32_product(normed_AND.flatten(0, 1), weight_VD).unflatten(0, normed_AND.shape[:2])
        highest_AN1 = logits_ANV.amax(-1, keepdim=True)
        asked_N2 = torch.cat([self._best_N1, targets_N.unsqueeze(-1)], dim=-1)
        asked_logits_AN2 = logits_ANV.gather(-1, asked_N2.expand(len(logits_ANV), -1, -1))
        # float32 logits of equal size are as good as impossible, and argmax takes 15 times as long as amax.
        likeliest_AN2 = (asked_logits_AN2 == highest_AN1).float()
        if self._mean_row_ND is not None:
            change_AN1 = ((normed_AND - self._normed_ND) * self._mean_row_ND).sum(-1, keepdim=True)
        else:
            change_AN1 = (self._probabilities_NV * (logits_ANV - self._logits_NV)).sum(-1, keepdim=True)
        log_sum_AN1 = logits_ANV.sub_(highest_AN1).exp_().sum(-1, keepdim=True).log_()
        kl_AN1 = (highest_AN1 - self._highest_N1 - change_AN1) + (log_sum_AN1 - self._log_sum_N1)
        unit_AND, parent_unit_ND = normalize(normed_AND.float(), dim=-1), normalize(self._normed_ND.float(), dim=-1)
        return TokenMetrics(
            kl=kl_AN1.squeeze(-1),
            lm_loss=(highest_AN1 - asked_logits_AN2[..., 1:] + log_sum_AN1).squeeze(-1),
            top1=likeliest_AN2[..., 1],
            top1_agreement=likeliest_AN2[..., 0],
            # Half the squared distance of unit vectors: 1 - cosine without the cancellation.
            cosine=(unit_AND - parent_unit_ND).square().sum(-1) / 2,
        )
