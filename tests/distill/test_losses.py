"""GKD losses against plain formulas, value and gradient, with the logits in one chunk and in many."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import puzzle.metrics
from puzzle.distill.losses import cosine_loss, kl_loss
from puzzle.parents import Parent


@pytest.mark.parametrize("chunk_logits", [1, 300 * 3, 2**24])
def test_kl_equals_the_plain_formula(chunk_logits: int, pico_parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puzzle.metrics, "_CHUNK_LOGITS", chunk_logits)
    child, parent = pico_parent.load().requires_grad_(True), pico_parent.load()
    torch.manual_seed(0)
    with torch.no_grad():
        child.model.norm.weight.mul_(1.1)
    hidden_BTD = torch.randn(2, 5, 32, requires_grad=True)
    parent_BTD = torch.randn(2, 5, 32)
    loss = kl_loss(child, parent, hidden_BTD, parent_BTD)
    found = torch.autograd.grad(loss, [hidden_BTD, child.lm_head.weight, child.model.norm.weight])
    logp = log_softmax(child.lm_head(child.model.norm(hidden_BTD)), -1)
    parent_logp = log_softmax(parent.lm_head(parent.model.norm(parent_BTD)), -1)
    plain = kl_div(logp, parent_logp, log_target=True, reduction="none").sum(-1).mean()
    expected = torch.autograd.grad(plain, [hidden_BTD, child.lm_head.weight, child.model.norm.weight])
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, expected)


def test_cosine_loss_ignores_scale_and_is_zero_for_the_same_direction() -> None:
    hidden_BTD = torch.randn(2, 3, 8)
    assert float(cosine_loss(3 * hidden_BTD, hidden_BTD)) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine_loss(-hidden_BTD, hidden_BTD)) == pytest.approx(2.0, abs=1e-6)
