"""Memory and time of the chunked head and KL loss beside plain logits, forward and backward.

    python benchmarks/distill_loss.py [TOKENS ...]

Vocabulary 128k, hidden size 256, float32, one thread; a fresh process for each method, the best of three times in it.
Memory is the highest resident size less that before, so it holds the head's gradient, 125 MiB, with both.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax

from puzzle.distill.losses import head_losses, kl_to_head

VOCABULARY, HIDDEN = 128_000, 256
ROUNDS = 3
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def plain(hidden_ND: Tensor, weight_VD: Tensor, parent_ND: Tensor, parent_VD: Tensor) -> Tensor:
    """The formula as one would write it."""
    with torch.no_grad():
        logp_NV = log_softmax(linear(parent_ND, parent_VD), -1)
    logq_NV = log_softmax(linear(hidden_ND, weight_VD), -1)
    return kl_div(logq_NV, logp_NV, log_target=True, reduction="none").sum(-1).mean()


def chunked(hidden_ND: Tensor, weight_VD: Tensor, parent_ND: Tensor, parent_VD: Tensor) -> Tensor:
    targets_N = torch.zeros(len(hidden_ND), dtype=torch.int64)
    kl = kl_to_head(parent_ND, parent_VD)
    return head_losses(hidden_ND, weight_VD, kl, targets_N, kl_weight=1.0, lm_weight=0.0)[0]


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "chunked": chunked}


def measure(method: str, num_tokens: int) -> None:
    """Print peak MiB and the best seconds of forward and backward."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden_ND, parent_ND = (torch.randn(num_tokens, HIDDEN, generator=generator) for _ in range(2))
    weight_VD, parent_VD = (torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.1) for _ in range(2))
    hidden_ND.requires_grad_(True)
    weight_VD.requires_grad_(True)
    before_kib, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(ROUNDS):
        began = time.process_time()
        loss = METHODS[method](hidden_ND, weight_VD, parent_ND, parent_VD)
        loss.backward()
        seconds.append(time.process_time() - began)
        norms = [float(tensor.grad.norm()) for tensor in (hidden_ND, weight_VD) if tensor.grad is not None]
        hidden_ND.grad = weight_VD.grad = None
    peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    print(f"{peak_mib:.0f} {min(seconds):.2f} {float(loss.detach()):.6f} {norms[0]:.6f} {norms[1]:.6f}")


def main(token_counts: list[int]) -> None:
    """Print a table row for each method and number of tokens."""
    print("| tokens | method | peak MiB | CPU s | loss | gradient norm, hidden | head |\n|---|---|---|---|---|---|---|")
    for num_tokens in token_counts:
        for method in METHODS:
            command = [sys.executable, __file__, "--measure", method, str(num_tokens)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            print(f"| {num_tokens} | {method} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(count) for count in sys.argv[1:]] or [512, 1024])
