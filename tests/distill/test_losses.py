"""GKD losses against plain formulas: values and both gradients, with the logits in one chunk and in many."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from puzzle.distill import losses
from puzzle.distill.losses import HeadLosses, Objective, ParentHead, TopTokens, cosine_loss, head_losses

TOKENS, HIDDEN, VOCABULARY = 11, 6, 40
OBJECTIVES = [
    Objective(),
    Objective(divergence="reverse"),
    Objective(divergence="skewed", skew=0.3),
    Objective(temperature=2.5, kl_weight=0.7, lm_weight=0.2),
    Objective(divergence="reverse", temperature=0.5, lm_weight=1.5),
    Objective(divergence="skewed", temperature=2.0, kl_weight=3.0),
    Objective(kl_weight=0.0, lm_weight=0.5),
]


@pytest.fixture(params=[1, 4, TOKENS], ids="chunks of {}".format, autouse=True)
def _chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 1)
    monkeypatch.setattr(losses, "_MIN_CHUNK_TOKENS", request.param)


class Case:
    """Hidden states and heads of a child and a parent."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.hidden_ND = random(TOKENS, HIDDEN).requires_grad_(True)
        self.weight_VD = random(VOCABULARY, HIDDEN).requires_grad_(True)
        self.parent = ParentHead(random(TOKENS, HIDDEN), random(VOCABULARY, HIDDEN))
        self.targets_N = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def fused(self, objective: Objective) -> HeadLosses:
        return head_losses(self.hidden_ND, self.weight_VD, self.parent, self.targets_N, objective)

    def plain(self, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        logits_NV = torch.nn.functional.linear(self.hidden_ND, self.weight_VD)
        parent_NV = torch.nn.functional.linear(self.parent.hidden_ND, self.parent.weight_VD)
        if logits_NV.dtype == torch.bfloat16:
            logits_NV, parent_NV = logits_NV.float(), parent_NV.float()
        logq, logp = (log_softmax(logits / objective.temperature, -1) for logits in (logits_NV, parent_NV))
        match objective.divergence:
            case "forward":
                divergence = kl_div(logq, logp, log_target=True, reduction="none")
            case "reverse":
                divergence = kl_div(logp, logq, log_target=True, reduction="none")
            case "skewed":
                mixture = objective.skew * logp.exp() + (1 - objective.skew) * logq.exp()
                divergence = kl_div(mixture.log(), logp, log_target=True, reduction="none")
        mean = objective.temperature**2 * divergence.sum(-1).mean() if objective.kl_weight else logits_NV.new_zeros(())
        lm = cross_entropy(logits_NV, self.targets_N) if objective.lm_weight else logits_NV.new_zeros(())
        return objective.kl_weight * mean + objective.lm_weight * lm, mean, lm

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden_ND, self.weight_VD])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_losses_equal_the_plain_formula(objective: Objective, dtype: torch.dtype) -> None:
    case = Case(dtype)
    found, expected = case.fused(objective), case.plain(objective)
    torch.testing.assert_close((found.total, found.divergence, found.lm), expected)
    torch.testing.assert_close(case.gradients(found.total), case.gradients(expected[0]))


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_an_upstream_gradient_scales_both(objective: Objective) -> None:
    case = Case()
    found = case.gradients(case.fused(objective).total.square() / 3)
    torch.testing.assert_close(found, case.gradients(case.plain(objective)[0].square() / 3))


def test_a_tied_head_gets_both_gradients() -> None:
    case, tokens_N = Case(), torch.arange(TOKENS)

    def gradient(loss: Callable[[Case], Tensor]) -> Tensor:
        case.hidden_ND = torch.nn.functional.embedding(tokens_N, case.weight_VD).tanh()
        return torch.autograd.grad(loss(case), case.weight_VD)[0]

    expected = gradient(lambda case: case.plain(Objective())[0])
    torch.testing.assert_close(gradient(lambda case: case.fused(Objective()).total), expected)


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_under_autocast_products_are_bfloat16_and_losses_float32(objective: Objective) -> None:
    case = Case(torch.float32)
    case.parent = ParentHead(case.parent.hidden_ND.bfloat16(), case.parent.weight_VD.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.fused(objective), case.plain(objective)
    torch.testing.assert_close(found.total, expected[0], rtol=1e-5, atol=1e-6)
    for ours, plain in zip(case.gradients(found.total), case.gradients(expected[0]), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - plain).norm() / plain.norm()) < 0.01


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), spread=st.sampled_from([1e-3, 1.0, 8.0]), which=st.integers(0, len(OBJECTIVES) - 1))
def test_probabilities_that_vanish_in_float32_leave_no_nan(seed: int, spread: float, which: int) -> None:
    case, exact = Case(torch.float32, seed, spread), Case(torch.float64, seed, spread)
    found, expected = case.fused(OBJECTIVES[which]).total, exact.fused(OBJECTIVES[which]).total
    # Two normalisers of a few units each are subtracted: a divergence below their rounding is noise of either sign.
    rounding = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=rounding)
    assert all(gradient.isfinite().all() for gradient in case.gradients(found))
    assert found >= -rounding


def test_nothing_is_differentiated_that_needs_no_gradient() -> None:
    case = Case()
    case.weight_VD.requires_grad_(False)
    hidden_gradient = torch.autograd.grad(case.fused(Objective()).total, case.hidden_ND)[0]
    torch.testing.assert_close(hidden_gradient, torch.autograd.grad(case.plain(Objective())[0], case.hidden_ND)[0])
    with torch.no_grad():
        assert not case.fused(Objective()).total.requires_grad


def test_all_tokens_kept_are_the_whole_divergence() -> None:
    case = Case()
    logp_NV = log_softmax(case.parent.hidden_ND @ case.parent.weight_VD.T, -1)
    values, ids = logp_NV.topk(VOCABULARY, -1)
    found = head_losses(case.hidden_ND, case.weight_VD, TopTokens(ids, values), case.targets_N, Objective())
    expected = case.plain(Objective())[0]
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(case.gradients(found.total), case.gradients(expected))


def test_tokens_left_out_count_as_one() -> None:
    case = Case()
    values, ids = log_softmax(case.parent.hidden_ND @ case.parent.weight_VD.T, -1).topk(5, -1)
    found = head_losses(case.hidden_ND, case.weight_VD, TopTokens(ids, values), case.targets_N, Objective(kl_weight=2))
    q_NV = (case.hidden_ND @ case.weight_VD.T).softmax(-1)
    q_NK, p_NK = q_NV.gather(-1, ids), values.exp()
    q, p = (torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1) for kept in (q_NK, p_NK))
    expected = 2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(case.gradients(found.total), case.gradients(expected))
    assert found.divergence < case.plain(Objective())[1]


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
