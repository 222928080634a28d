"""GKD losses against plain formulas: values and both gradients, with the logits in one chunk and in many."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, linear, log_softmax

from puzzle.distill import losses
from puzzle.distill.losses import KL, cosine_loss, head_losses, kl_to_head, kl_to_top_tokens

HIDDEN = 6
SIZES = [(11, 40), (100, 30_000)]
"""Tokens and vocabulary: one chunk; chunks of 48 tokens, the last one shorter."""
WEIGHTS = [(1.0, 0.0), (0.7, 0.2), (0.0, 0.5)]
"""Of KL and LM loss."""


class Losses(NamedTuple):
    total: Tensor
    kl: Tensor
    lm: Tensor


class Case:
    """Hidden states and heads of a child and a parent."""

    def __init__(
        self, size: tuple[int, int] = SIZES[0], dtype: torch.dtype = torch.float64, spread: float = 1.0
    ) -> None:
        tokens, vocabulary = size
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.hidden_ND = random(tokens, HIDDEN).requires_grad_(True)
        self.weight_VD = random(vocabulary, HIDDEN).requires_grad_(True)
        self.parent_ND, self.parent_VD = random(tokens, HIDDEN), random(vocabulary, HIDDEN)
        self.targets_N = torch.randint(vocabulary, (tokens,), generator=generator)

    def chunked(self, kl_weight: float = 1.0, lm_weight: float = 0.0, kl: KL | None = None) -> Losses:
        kl = kl or kl_to_head(self.parent_ND, self.parent_VD)
        weights = {"kl_weight": kl_weight, "lm_weight": lm_weight}
        return Losses(*head_losses(self.hidden_ND, self.weight_VD, kl, self.targets_N, **weights))

    def plain(self, kl_weight: float = 1.0, lm_weight: float = 0.0) -> Losses:
        logits_NV = linear(self.hidden_ND, self.weight_VD)
        logq, logp = (log_softmax(each, -1) for each in (logits_NV, linear(self.parent_ND, self.parent_VD)))
        zero = logits_NV.new_zeros(())
        kl = kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean() if kl_weight else zero
        lm = cross_entropy(logits_NV, self.targets_N) if lm_weight else zero
        return Losses(kl_weight * kl + lm_weight * lm, kl, lm)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden_ND, self.weight_VD])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_losses_equal_the_plain_formula(
    size: tuple[int, int], weights: tuple[float, float], dtype: torch.dtype
) -> None:
    case = Case(size, dtype)
    found, expected = case.chunked(*weights), case.plain(*weights)
    torch.testing.assert_close(tuple(found), tuple(expected))
    found_gradients = case.gradients(found.total.square() / 3)
    torch.testing.assert_close(found_gradients, case.gradients(expected.total.square() / 3))


def test_a_tied_head_gets_both_gradients() -> None:
    case, tokens_N = Case(), torch.arange(11)

    def gradient(loss: Callable[[], Losses]) -> Tensor:
        case.hidden_ND = torch.nn.functional.embedding(tokens_N, case.weight_VD).tanh()
        return torch.autograd.grad(loss().total, case.weight_VD)[0]

    torch.testing.assert_close(gradient(case.chunked), gradient(case.plain))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_under_autocast_matrices_are_bfloat16_and_logits_float32(
    size: tuple[int, int], weights: tuple[float, float]
) -> None:
    """As if the rounded matrices had been multiplied in float32: nothing is lost between the product and the loss."""
    case, exact = (Case(size, torch.float32, spread=4.0) for _ in range(2))
    case.parent_ND, case.parent_VD = case.parent_ND.bfloat16(), case.parent_VD.bfloat16()
    exact.parent_ND, exact.parent_VD = case.parent_ND.float(), case.parent_VD.float()
    exact.hidden_ND = case.hidden_ND.detach().bfloat16().float().requires_grad_(True)
    exact.weight_VD = case.weight_VD.detach().bfloat16().float().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.chunked(*weights)
    expected = exact.plain(*weights)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-6)
    for ours, plain in zip(case.gradients(found.total), exact.gradients(expected.total), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - plain).norm() / plain.norm()) < 0.01


@pytest.mark.parametrize("spread", [1e-3, 1.0, 8.0])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_probabilities_that_vanish_in_float32_leave_no_nan(spread: float, weights: tuple[float, float]) -> None:
    case, exact = Case(SIZES[0], torch.float32, spread), Case(SIZES[0], torch.float64, spread)
    found, expected = case.chunked(*weights).total, exact.chunked(*weights).total
    # Two normalisers of a few units each are subtracted: a divergence below their rounding is noise of either sign.
    rounding = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=rounding)
    assert all(gradient.isfinite().all() for gradient in case.gradients(found))
    assert found >= -rounding


def test_nothing_is_differentiated_that_needs_no_gradient() -> None:
    case = Case()
    case.weight_VD.requires_grad_(False)
    hidden_gradient = torch.autograd.grad(case.chunked().total, case.hidden_ND)[0]
    torch.testing.assert_close(hidden_gradient, torch.autograd.grad(case.plain().total, case.hidden_ND)[0])
    with torch.no_grad():
        assert not case.chunked().total.requires_grad


@pytest.mark.parametrize(("size", "kept"), [(SIZES[0], 5), (SIZES[0], 40), (SIZES[1], 5)], ids=str)
def test_tokens_left_out_count_as_one(size: tuple[int, int], kept: int) -> None:
    case = Case(size)
    logp_NK, ids_NK = log_softmax(case.parent_ND @ case.parent_VD.T, -1).topk(kept, -1)
    found = case.chunked(2.0, kl=kl_to_top_tokens(ids_NK, logp_NK))
    p_NK, q_NK = logp_NK.exp(), (case.hidden_ND @ case.weight_VD.T).softmax(-1).gather(-1, ids_NK)
    if kept < size[1]:
        p_NK, q_NK = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p_NK, q_NK))
        assert found.kl < case.plain().kl
    expected = 2 * (p_NK * (p_NK / q_NK).log()).sum(-1).mean()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(case.gradients(found.total), case.gradients(expected))


def test_cosine_equals_the_plain_formula() -> None:
    torch.manual_seed(0)
    child_BTD = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    parent_BTD = torch.randn(2, 3, 8, dtype=torch.float64)
    found, expected = cosine_loss(child_BTD, parent_BTD), 1 - cosine_similarity(child_BTD, parent_BTD, -1).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found / 3, child_BTD), torch.autograd.grad(expected / 3, child_BTD))


def test_cosine_ignores_scale_and_is_zero_for_the_same_direction() -> None:
    hidden_BTD = torch.randn(2, 3, 8)
    assert float(cosine_loss(3 * hidden_BTD, hidden_BTD.bfloat16())) < 1e-4
    assert float(cosine_loss(3 * hidden_BTD, hidden_BTD)) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine_loss(-hidden_BTD, hidden_BTD)) == pytest.approx(2.0, abs=1e-6)


def test_cosine_as_a_compiler_sees_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole graphs, without a question to the device; in bfloat16 to the rounding of what is compared."""
    generator = torch.Generator().manual_seed(0)
    child_BTD, parent_BTD = torch.randn(2, 2, 5, 64, generator=generator, dtype=torch.float64).unbind()
    plain_BTD = child_BTD.clone().requires_grad_()
    expected = 1 - cosine_similarity(plain_BTD, parent_BTD, -1).mean()
    (gradient_BTD,) = torch.autograd.grad(expected, plain_BTD)
    for name in ("_distance", "_gradient"):
        function = getattr(losses, name).__wrapped__
        monkeypatch.setattr(losses, name, torch.compile(function, backend="aot_eager", fullgraph=True))
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        own_BTD = child_BTD.to(dtype).requires_grad_()
        found = cosine_loss(own_BTD, parent_BTD.to(dtype))
        (own_gradient_BTD,) = torch.autograd.grad(found, own_BTD)
        assert own_gradient_BTD.dtype == dtype
        assert found.item() == pytest.approx(expected.item(), rel=error)
        assert float((own_gradient_BTD - gradient_BTD).norm() / gradient_BTD.norm()) < error
