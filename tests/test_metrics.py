"""Per-token metrics: against the same in float64 from whole logits, for tiny and for large differences."""

import pytest
import torch
from tests.conftest import pico_puzzle
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from puzzle.metrics import TokenMetrics, compare
from puzzle.modeling import PuzzleForCausalLM

TOKENS, HIDDEN, VOCABULARY = 9000, 32, 128  # more than one chunk


def _hidden(seed: int) -> Tensor:
    return 3 * torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _targets() -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))


def _exact(parent: PuzzleForCausalLM, model: PuzzleForCausalLM, parent_ND: Tensor, hiddens_AND: Tensor) -> TokenMetrics:
    """The definitions, in float64 from the normed hidden states."""
    own_ND, normed_AND = parent.model.norm(parent_ND).double(), model.model.norm(hiddens_AND).double()
    logp_NV = log_softmax(own_ND @ parent.lm_head.weight.double().T, -1)
    logq_ANV = log_softmax(normed_AND @ model.lm_head.weight.double().T, -1)
    best_AN, targets_AN1 = logq_ANV.argmax(-1), _targets().expand(len(hiddens_AND), -1).unsqueeze(-1)
    return TokenMetrics(
        kl=(logp_NV.exp() * (logp_NV - logq_ANV)).sum(-1),
        lm_loss=-logq_ANV.gather(-1, targets_AN1).squeeze(-1),
        top1=(best_AN == _targets()).double(),
        top1_agreement=(best_AN == logp_NV.argmax(-1)).double(),
        cosine=1 - cosine_similarity(own_ND, normed_AND, dim=-1),
    )


@pytest.fixture
def model() -> PuzzleForCausalLM:
    return pico_puzzle("kv4+w48").requires_grad_(False)


@pytest.mark.parametrize("distance", [3e-4, 0.1, 3.0])
def test_metrics_are_their_definitions(model: PuzzleForCausalLM, distance: float) -> None:
    hiddens_AND = _hidden(0) + distance * torch.stack([_hidden(1), _hidden(2), _hidden(3)])
    found = compare(model, model, _hidden(0), hiddens_AND, _targets())
    exact = _exact(model, model, _hidden(0), hiddens_AND)
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-4, atol=1e-5)
    assert found.kl.mean(1).tolist() == pytest.approx(exact.kl.mean(1).tolist(), rel=1e-4, abs=5e-8)
    torch.testing.assert_close(found.lm_loss.double(), exact.lm_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cosine.double(), exact.cosine, rtol=1e-3, atol=1e-11)
    assert (found.top1.double() == exact.top1).all()
    assert (found.top1_agreement.double() == exact.top1_agreement).all()


def test_the_parent_itself_is_at_no_distance(model: PuzzleForCausalLM) -> None:
    same = compare(model, model, _hidden(0), _hidden(0)[None], _targets())
    assert same.kl.abs().max() < 1e-6
    assert same.cosine.max() < 1e-6
    assert same.top1_agreement.min() == 1


def test_a_candidate_with_a_head_and_a_norm_of_its_own(model: PuzzleForCausalLM) -> None:
    """As after GKD."""
    other = pico_puzzle("kv4+w48", initializer_range=0.21).requires_grad_(False)
    found = compare(model, other, _hidden(0), _hidden(1)[None], _targets())
    exact = _exact(model, other, _hidden(0), _hidden(1)[None])
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lm_loss.double(), exact.lm_loss, rtol=1e-5, atol=1e-5)


def test_a_head_that_stays_bfloat16_as_on_a_gpu(model: PuzzleForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """There only a product's output is float32; the other metrics of such a parent are those of a CPU."""
    model.bfloat16()
    parent_ND = _hidden(0).bfloat16()
    hiddens_AND = torch.stack([parent_ND, parent_ND + 0.1 * _hidden(1).bfloat16()])
    expected = compare(model, model, parent_ND, hiddens_AND, _targets())
    monkeypatch.setattr("puzzle.metrics.float32_operand", lambda weight_VD: weight_VD)
    monkeypatch.setattr("puzzle.metrics.float32_product", lambda rows, operand: rows.float() @ operand.float().T)
    found = compare(model, model, parent_ND, hiddens_AND, _targets())
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_the_divergence_of_a_tiny_change_is_not_that_of_rounded_logits(model: PuzzleForCausalLM) -> None:
    """Logits of 16 to 32 have steps of 0.125 in bfloat16; their rounding alone is a divergence of up to 1e-3."""
    large = model.bfloat16()
    large.lm_head.weight.mul_(8)
    parent_ND = _hidden(0).bfloat16()
    changed_AND = (parent_ND.float() * (1 + 2**-8 * (_hidden(1)[None] > 3))).bfloat16()
    found = compare(large, large, parent_ND, changed_AND, _targets())
    exact = _exact(large, large, parent_ND, changed_AND)
    logits = [large.lm_head(large.model.norm(each)).double() for each in (parent_ND, changed_AND)]
    logp_NV, logq_ANV = (log_softmax(each, -1) for each in logits)
    rounded = float((logp_NV.exp() * (logp_NV - logq_ANV)).sum(-1).mean())
    assert float(logits[0].abs().max()) > 16
    assert float(found.kl.mean()) == pytest.approx(float(exact.kl.mean()), rel=1e-3)
    assert rounded > 1.2 * float(exact.kl.mean())
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-3, atol=1e-5)
    assert (found.top1.double() == exact.top1).all()
