"""The child beside its parent, in lock step and from the cache, against whole forwards of both."""

from pathlib import Path
from typing import Any

import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from puzzle.distill.teacher import Batch, Distillation, TopTokens, fill_cache
from puzzle.modeling import PuzzleForCausalLM
from puzzle.recipe import DistilSettings


def parent() -> PuzzleForCausalLM:
    return pico_puzzle("kv4+w48", "kv4+w48", "kv4+w48").requires_grad_(False)


def child() -> PuzzleForCausalLM:
    return pico_puzzle("kv2win4s1+w16", "none+none", "linear+w48")


def batch() -> Batch:
    tokens = random_tokens(4, 13)
    positions = torch.cat([torch.arange(6), torch.arange(6)]).expand(4, -1)
    return Batch("training000000", tokens[:, :-1], tokens[:, 1:], positions)


def distillation(
    student: PuzzleForCausalLM, teacher: PuzzleForCausalLM | None, cache: Path | None = None, **settings: Any
) -> Distillation:
    return Distillation(student, teacher, cache, DistilSettings(**settings), torch.float32)


def gradients(loss: Tensor, model: PuzzleForCausalLM) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_lock_step_equals_whole_forwards_and_leaves_out_empty_layers() -> None:
    teacher, student, read = parent(), child(), batch()
    with torch.no_grad():
        expected = teacher(read.tokens_BT, position_ids=read.positions_BT, output_hidden_states=True, use_cache=False)
        last = teacher.model.layers[2](expected.hidden_states[2], **_context(teacher, read))
    found = student(read.tokens_BT, position_ids=read.positions_BT, output_hidden_states=True, use_cache=False)
    own_last = student.model.layers[2](found.hidden_states[2], **_context(student, read))
    pairs = [(found.hidden_states[1], expected.hidden_states[1]), (own_last, last)]
    cosine = torch.stack([1 - cosine_similarity(*pair, dim=-1).mean() for pair in pairs]).mean()
    logp, logq = (output.logits.log_softmax(-1) for output in (expected, found))
    kl = kl_div(logq, logp, log_target=True, reduction="none").sum(-1).mean()
    losses = distillation(student, teacher, kl_weight=1.3, cosine_weight=0.7)(read)
    torch.testing.assert_close((losses.kl, losses.cosine), (kl.detach(), cosine.detach()))
    total = 1.3 * kl + 0.7 * cosine
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(gradients(losses.total, student), gradients(total, student), rtol=1e-4, atol=1e-5)


def _context(model: PuzzleForCausalLM, read: Batch) -> dict[str, object]:
    return model.model.context(model.embed(read.tokens_BT), position_ids=read.positions_BT)


def test_held_out_kl_is_computed_whatever_its_weight() -> None:
    teacher, student = parent(), child()
    losses = distillation(student, teacher, kl_weight=0)
    assert float(losses(batch()).kl) == 0
    with torch.no_grad():
        torch.testing.assert_close(losses(batch()).kl, distillation(student, teacher)(batch()).kl)


def test_a_cache_of_all_tokens_teaches_like_the_parent(tmp_path: Path) -> None:
    teacher, student, read = parent(), child(), batch()
    live = distillation(student, teacher, cosine_weight=0, lm_weight=0.5)(read)
    fill_cache(tmp_path, TopTokens(teacher, 10**6), [read], 1)
    cached = distillation(student, None, tmp_path, lm_weight=0.5)(read)
    torch.testing.assert_close(cached.total, live.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(cached.total, student), gradients(live.total, student), rtol=1e-3, atol=1e-5)
    assert float(cached.cosine) == 0


def test_a_cache_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    teacher, read = parent(), batch()
    other = Batch("training000001", read.tokens_BT + 1, read.targets_BT, read.positions_BT)
    fill_cache(tmp_path, TopTokens(teacher, 3), [read], 2)
    seen: list[Tensor] = []
    teacher.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fill_cache(tmp_path, TopTokens(teacher, 3), [read, other], 2)
    assert len(seen) == 1
    assert len(list(tmp_path.iterdir())) == 2
