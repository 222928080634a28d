"""Low-rank updates: nothing at first, exact when merged, and all that trains."""

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from tests.distill.test_gkd import Distil, child, distilled, kl, weights

from puzzle.child import Child
from puzzle.distill import gkd
from puzzle.distill.adapters import add_adapters, merge_adapters
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError

__all__ = ["child", "distilled"]  # fixtures


def test_a_merged_model_computes_what_the_adapted_one_does() -> None:
    model, tokens_BT = pico_puzzle("kv2+w16", "linear+none", "none+linear", "kv4+w48"), random_tokens(2, 9)
    before = model(tokens_BT).logits
    updates = add_adapters(model, rank=3, seed=0)
    torch.testing.assert_close(model(tokens_BT).logits, before, rtol=0, atol=0)
    for value in updates.values():
        value.data.normal_(std=0.2, generator=torch.Generator().manual_seed(value.numel()))
    adapted = model(tokens_BT).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    merged = pico_puzzle("kv2+w16", "linear+none", "none+linear", "kv4+w48")
    merge_adapters(merged, updates)
    torch.testing.assert_close(merged(tokens_BT).logits, adapted, rtol=1e-4, atol=1e-4)


def test_only_updates_of_matrices_in_layers_train() -> None:
    model = pico_puzzle("kv2+w16", "none+none")
    updates = add_adapters(model, rank=2, seed=0)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == set(updates)
    assert len(updates) == 2 * 7
    assert sum(value.numel() for value in updates.values()) == sum(
        2 * sum(module.weight.shape) for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)
    )


def test_distillation_of_adapters_changes_low_rank_parts_of_matrices_alone(distilled: Distil, child: Child) -> None:
    found = distilled(adapter_rank=2, learning_rate=1e-2, tokens=8192)
    assert kl(found)[-1] < 0.95 * kl(found)[0]
    before, after = weights(child), weights(found)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        assert "proj.weight" in name or "linear" in name
        singular = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular[2] < 1e-5 * singular[0]


def test_adapters_are_for_one_process(distilled: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gkd.Group, "current", classmethod(lambda cls: Group(0, 2)))
    monkeypatch.setattr(gkd, "_lesson", lambda *_: type("Lesson", (), {"student": pico_puzzle("kv2+w16")}))
    with pytest.raises(PuzzleError, match=r"distil\.adapter_rank: adapters are for one process"):
        distilled(adapter_rank=2)
