"""Families that divide or cap their logits: scores, GKD and the teacher cache mean the logits that the model gives."""

from pathlib import Path

import pytest
import torch
from tests.modeling.test_families import as_puzzle, mixed_child, original
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from puzzle.distill.teacher import Batch, Distillation, TopTokens, fill_cache
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.recipe import DistilSettings

Models = tuple[PuzzleForCausalLM, PuzzleForCausalLM, Batch]


@pytest.fixture(params=["granite", "gemma2"])
def models(request: pytest.FixtureRequest) -> Models:
    """Parent, child, and a text; logits of such a size that the cap is felt."""
    parent = as_puzzle(original(request.param))
    child = mixed_child(parent)
    for model in (parent, child):
        model.lm_head.weight.data *= 20
    tokens_BT = torch.randint(128, (2, 9))
    return parent, child, Batch("text", tokens_BT[:, :-1], tokens_BT[:, 1:], None)


def expected(models: Models) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and LM loss of whole logits."""
    parent, child, batch = models
    logp, logq = (log_softmax(model(batch.tokens_BT).logits.double(), -1).flatten(0, 1) for model in (parent, child))
    kl = kl_div(logq, logp.detach(), log_target=True, reduction="none").sum(-1).mean()
    return kl, cross_entropy(logq, batch.targets_BT.flatten())


@torch.no_grad()
def test_metrics(models: Models) -> None:
    parent, child, batch = models
    finals = [model(batch.tokens_BT, output_hidden_states=True) for model in (parent, child)]
    for model in (parent, child):  # without the final norm
        model.model.norm.forward = lambda hidden: hidden
    states = [model.model(batch.tokens_BT).last_hidden_state.flatten(0, 1) for model in (parent, child)]
    for model in (parent, child):
        del model.model.norm.forward
    assert finals[0].logits.abs().max() < 100
    found = compare(parent, child, states[0], states[1].unsqueeze(0), batch.targets_BT.flatten())
    kl, lm = expected(models)
    assert float(found.kl.mean()) == pytest.approx(float(kl), rel=1e-4)
    assert float(found.lm_loss.mean()) == pytest.approx(float(lm), rel=1e-4)
    child.lm_head.weight.data.copy_(parent.lm_head.weight)
    child.model.norm.load_state_dict(parent.model.norm.state_dict())
    shared = compare(parent, parent, states[0], states[1].unsqueeze(0), batch.targets_BT.flatten())
    assert float(shared.kl.mean()) == pytest.approx(float(expected(models)[0]), rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_distillation(models: Models, cached: bool, tmp_path: Path) -> None:
    """The loss and its gradient."""
    parent, child, batch = models
    if cached:
        fill_cache(tmp_path, TopTokens(parent, 128), [batch], 1)
    child.requires_grad_(True)
    weights = {"cosine_weight": 0.0, "kl_weight": 1.0, "lm_weight": 0.5}
    teacher = None if cached else parent.requires_grad_(False)
    model = Distillation(child, teacher, tmp_path if cached else None, DistilSettings(**weights), torch.float32)
    kl, lm = expected(models)
    (kl + 0.5 * lm).backward()
    wanted = {name: parameter.grad for name, parameter in child.named_parameters() if parameter.grad is not None}
    child.zero_grad()
    losses = model(batch)
    losses.total.backward()
    assert losses.kl.item() == pytest.approx(kl.item(), rel=1e-3)
    assert wanted.keys() == {name for name, parameter in child.named_parameters() if parameter.grad is not None}
    for name, parameter in child.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=2e-3, atol=2e-5)
