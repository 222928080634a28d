"""Per-token metrics: against the same in float64 from whole logits, for tiny and for large differences."""

from itertools import pairwise

import pytest
import torch
from tests.conftest import pico_puzzle
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

import puzzle.metrics
from puzzle.metrics import TokenMetrics, chunks, compare
from puzzle.modeling import PuzzleForCausalLM

TOKENS, HIDDEN, VOCABULARY = 600, 32, 128


def _hidden(seed: int) -> Tensor:
    return 3 * torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _targets() -> Tensor:
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))


def _exact(parent: PuzzleForCausalLM, model: PuzzleForCausalLM, parent_ND: Tensor, hidden_ND: Tensor) -> TokenMetrics:
    """The definitions, in float64."""
    parent, model = parent.double(), model.double()
    own_ND, normed_ND = parent.model.norm(parent_ND.double()), model.model.norm(hidden_ND.double())
    logp_NV, logq_NV = log_softmax(parent.lm_head(own_ND), -1), log_softmax(model.lm_head(normed_ND), -1)
    best_N = logq_NV.argmax(-1)
    metrics = TokenMetrics(
        kl=(logp_NV.exp() * (logp_NV - logq_NV)).sum(-1),
        lm_loss=-logq_NV.gather(-1, _targets().unsqueeze(-1)).squeeze(-1),
        top1=(best_N == _targets()).double(),
        top1_agreement=(best_N == logp_NV.argmax(-1)).double(),
        cosine=1 - cosine_similarity(own_ND, normed_ND, dim=-1),
    )
    parent.float()
    model.float()
    return metrics


@pytest.fixture
def model() -> PuzzleForCausalLM:
    return pico_puzzle("kv4+w48").requires_grad_(False)


@pytest.mark.parametrize("distance", [3e-4, 0.1, 3.0])
@pytest.mark.parametrize("chunk_logits", [VOCABULARY * 50, 2**20])
def test_metrics_are_their_definitions(
    model: PuzzleForCausalLM, distance: float, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puzzle.metrics, "_CHUNK_LOGITS", chunk_logits)
    parent_ND, changes = _hidden(0), (_hidden(1), _hidden(2))
    hiddens_ND = [parent_ND + distance * change for change in changes]
    for hidden_ND, found in zip(hiddens_ND, compare(model, model, parent_ND, hiddens_ND, _targets()), strict=True):
        exact = _exact(model, model, parent_ND, hidden_ND)
        torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-4, atol=1e-5)
        assert float(found.kl.mean()) == pytest.approx(float(exact.kl.mean()), rel=1e-4, abs=5e-8)
        torch.testing.assert_close(found.lm_loss.double(), exact.lm_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.cosine.double(), exact.cosine, rtol=1e-3, atol=1e-12)
        assert (found.top1.double() == exact.top1).all()
        assert (found.top1_agreement.double() == exact.top1_agreement).all()


def test_the_smallest_of_these_differences_is_tiny_and_the_largest_is_large(model: PuzzleForCausalLM) -> None:
    kl = [float(_exact(model, model, _hidden(0), _hidden(0) + d * _hidden(1)).kl.mean()) for d in (3e-4, 3.0)]
    assert kl[0] < 1e-6
    assert kl[1] > 1


def test_the_parent_itself_is_at_no_distance(model: PuzzleForCausalLM) -> None:
    hidden_ND = _hidden(0)
    (same,) = compare(model, model, hidden_ND, [hidden_ND.clone()], _targets())
    assert same.kl.abs().max() < 1e-6
    assert same.cosine.max() < 1e-6
    assert same.top1_agreement.min() == 1


def test_a_candidate_with_a_head_and_a_norm_of_its_own(model: PuzzleForCausalLM) -> None:
    """As after GKD."""
    other = pico_puzzle("kv4+w48", initializer_range=0.21).requires_grad_(False)
    (found,) = compare(model, other, _hidden(0), [_hidden(1)], _targets())
    exact = _exact(model, other, _hidden(0), _hidden(1))
    torch.testing.assert_close(found.kl.double(), exact.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lm_loss.double(), exact.lm_loss, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_give_the_divergence_of_their_own_distributions(model: PuzzleForCausalLM) -> None:
    subblock = pico_puzzle("kv4+w48").requires_grad_(False).bfloat16()
    parent_ND = _hidden(0).bfloat16()
    hidden_ND = (parent_ND.float() + 0.02 * _hidden(1)).bfloat16()
    (found,) = compare(subblock, subblock, parent_ND, [hidden_ND], _targets())
    logits = [subblock.lm_head(subblock.model.norm(each)).double() for each in (parent_ND, hidden_ND)]
    logp_NV, logq_NV = (log_softmax(each, -1) for each in logits)
    torch.testing.assert_close(found.kl.double(), (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1), rtol=1e-3, atol=1e-5)
    assert found.kl.min() > -1e-5
    assert (found.top1.bool() == (logits[1].argmax(-1) == _targets())).all()


@pytest.mark.parametrize(("vocabulary", "longest"), [(257, 4096), (4096, 256), (32_000, 256), (128_256, 256)])
def test_no_more_than_a_few_hundred_tokens_of_a_large_vocabulary_at_once(vocabulary: int, longest: int) -> None:
    parts = list(chunks(10_000, vocabulary))
    assert parts[0].stop <= longest
    assert (parts[0].start, parts[-1].stop >= 10_000) == (0, True)
    assert all(left.stop == right.start for left, right in pairwise(parts))
