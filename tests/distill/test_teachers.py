"""The child beside its parent, in lock step and from the cache, against whole forwards of both."""

from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from puzzle.distill.batches import Batch, Boundary
from puzzle.distill.losses import Objective
from puzzle.distill.teachers import CachedTeacher, LikeliestTokens, LiveTeacher, fill_cache
from puzzle.distill.trainer import _checkpoint_layers
from puzzle.modeling import PuzzleForCausalLM

COSINE_WEIGHT = 0.7


def parent() -> PuzzleForCausalLM:
    return pico_puzzle("kv4+w48", "kv4+w48", "kv4+w48").requires_grad_(False)


def child() -> PuzzleForCausalLM:
    return pico_puzzle("kv2win4s1+w16", "none+none", "linear+w48")


def batch(sequences: int = 4) -> Batch:
    tokens = random_tokens(sequences, 13)
    tokens[:, 5] = 0
    return Batch("training000000", tokens[:, :-1], tokens[:, 1:], Boundary(0).positions(tokens[:, :-1]))


def gradients(loss: Tensor, model: PuzzleForCausalLM) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_lock_step_equals_whole_forwards_and_leaves_out_empty_layers() -> None:
    teacher, student, read = parent(), child(), batch()
    with torch.no_grad():
        expected = teacher(read.tokens_BT, position_ids=read.positions_BT, output_hidden_states=True, use_cache=False)
        layers = teacher.model.layers
        last = layers[2](expected.hidden_states[2], **_context(teacher, read))
    found = student(read.tokens_BT, position_ids=read.positions_BT, output_hidden_states=True, use_cache=False)
    own_last = student.model.layers[2](found.hidden_states[2], **_context(student, read))
    pairs = [(found.hidden_states[1], expected.hidden_states[1]), (own_last, last)]
    cosine = torch.stack([1 - cosine_similarity(*pair, dim=-1).mean() for pair in pairs]).mean()
    logp, logq = (output.logits.log_softmax(-1) for output in (expected, found))
    kl = kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()
    losses = LiveTeacher(teacher).losses(student, read, Objective(kl_weight=1.3), COSINE_WEIGHT)
    torch.testing.assert_close((losses.kl, losses.cosine), (kl.detach(), cosine.detach()))
    total = 1.3 * kl + COSINE_WEIGHT * cosine
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(gradients(losses.total, student), gradients(total, student), rtol=1e-4, atol=1e-5)


def _context(model: PuzzleForCausalLM, read: Batch) -> dict[str, object]:
    return model.model.context(model.model.embed_tokens(read.tokens_BT), position_ids=read.positions_BT)


def test_parts_of_a_batch_add_up_to_it() -> None:
    teacher, student, read = LiveTeacher(parent()), child(), batch()
    whole = teacher.losses(student, read, Objective(lm_weight=0.5), COSINE_WEIGHT).total
    parts = [
        teacher.losses(
            student,
            Batch("", read.tokens_BT[rows], read.targets_BT[rows], read.positions_BT[rows]),  # type: ignore[index]
            Objective(lm_weight=0.5),
            COSINE_WEIGHT,
        ).total
        for rows in (slice(0, 2), slice(2, 4))
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(gradients(mean, student), gradients(whole, student), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_checkpointing_recomputes_layers_and_changes_nothing(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, read, found = LiveTeacher(parent()), batch(), []
    student = child()
    student.config.attention_dropout = 0.5  # training mode would bring it
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    calls = []
    mlp = student.model.layers[2].mlp
    monkeypatch.setattr(type(mlp), "forward", _counted(type(mlp).forward, calls))
    for checkpointed in (False, True):
        if checkpointed:
            _checkpoint_layers(student)
        student.requires_grad_(True)
        student.model.embed_tokens.requires_grad_(not frozen)
        calls.clear()
        student.zero_grad()
        teacher.losses(student, read, Objective(), COSINE_WEIGHT).total.backward()
        found.append({name: value.grad for name, value in student.named_parameters() if value.grad is not None})
        # The parent's layers have three FFNs, the child's two; those are run again for the backward pass.
        assert len(calls) == (7 if checkpointed else 5)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _counted(forward, calls):  # type: ignore[no-untyped-def]
    def counted(self, hidden):  # type: ignore[no-untyped-def]
        calls.append(1)
        return forward(self, hidden)

    return counted


def test_a_cache_of_all_tokens_teaches_like_the_parent(tmp_path: Path) -> None:
    model, student, read = parent(), child(), batch()
    live = LiveTeacher(model).losses(student, read, Objective(lm_weight=0.5), 0.0).total
    fill_cache(tmp_path, LikeliestTokens(model, 10**6), [read], 1)
    cached = CachedTeacher(tmp_path, torch.float32).losses(student, read, Objective(lm_weight=0.5), COSINE_WEIGHT)
    torch.testing.assert_close(cached.total, live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(cached.total, student), gradients(live, student), rtol=1e-3, atol=1e-5)
    assert float(cached.cosine) == 0


def test_a_cache_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = parent(), batch()
    other = Batch("training000001", read.tokens_BT + 1, read.targets_BT, read.positions_BT)
    fill_cache(tmp_path, LikeliestTokens(model, 3), [read], 2)
    seen: list[object] = []
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *args, forward=model.model.forward, **named: (seen.append(args), forward(*args, **named))[1],
    )
    fill_cache(tmp_path, LikeliestTokens(model, 3), [read, other], 2)
    assert len(seen) == 1
    assert len(list(tmp_path.iterdir())) == 2
