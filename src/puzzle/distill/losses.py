"""The losses of global knowledge distillation (paper section 2.5).

B batch, T tokens, D hidden size, N = B * T, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from puzzle.metrics import chunks, log_probabilities
from puzzle.modeling import PuzzleForCausalLM


def cosine_loss(child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """1 - cosine similarity of the hidden states after one layer, mean over tokens."""
    return 1 - cosine_similarity(child_BTD.float(), parent_BTD.float(), dim=-1).mean()


def kl_loss(child: PuzzleForCausalLM, parent: PuzzleForCausalLM, child_BTD: Tensor, parent_BTD: Tensor) -> Tensor:
    """KL(parent || child) of the next-token distributions, mean over tokens, from the outputs of the last layers.

    Logits exist for a chunk of tokens at a time and are computed again in the backward pass.
    """
    child_ND, parent_ND = child_BTD.flatten(0, 1), parent_BTD.flatten(0, 1)

    def chunk_sum(child_rows_ND: Tensor, parent_rows_ND: Tensor) -> Tensor:
        with torch.no_grad():
            parent_logp_NV = log_probabilities(parent, parent_rows_ND)
        logp_NV = log_probabilities(child, child_rows_ND)
        return torch.nn.functional.kl_div(logp_NV, parent_logp_NV, log_target=True, reduction="sum")

    sums = [
        checkpoint(chunk_sum, child_ND[rows], parent_ND[rows], use_reentrant=False)
        for rows in chunks(len(child_ND), child.config.vocab_size)
    ]
    return torch.stack(sums).sum() / len(child_ND)
