"""What a step reads: the same tokens however it is cut and shared out, and documents that do not see each other."""

from typing import Any

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens

from puzzle.data import TokenData
from puzzle.distill.batches import Batch, Batches
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.recipe import DistilSettings


def batches(data: TokenData, **settings: Any) -> Batches:
    return Batches(data, DistilSettings.model_validate({"batch_size": 4, "tokens": 32 * 4 * 10} | settings), 0)


def test_parts_of_a_step_read_what_the_step_reads(pico_data: TokenData) -> None:
    whole, parts = batches(pico_data), batches(pico_data, accumulate=2)
    assert whole.steps == parts.steps == 10
    for step in (0, 9):
        (expected,), found = list(whole.training(step)), list(parts.training(step))
        for name in ("tokens_BT", "targets_BT", "positions_BT"):
            assert torch.equal(torch.cat([getattr(part, name) for part in found]), getattr(expected, name))
        assert torch.equal(expected.tokens_BT, pico_data.training_batch(step, 4, 0)[:, :-1])
    assert len({batch.name for batch in parts}) == len(list(parts)) == 20 + len(list(parts.validation()))


def test_validation_is_the_first_of_its_range(pico_data: TokenData) -> None:
    read = list(batches(pico_data, validation_tokens=32 * 6).validation())
    assert [len(batch.tokens_BT) for batch in read] == [4, 2]
    found = torch.cat([batch.tokens_BT for batch in read])
    assert torch.equal(found, pico_data.sequences("validation", slice(0, 6))[:, :-1])


def test_documents_see_nothing_of_each_other() -> None:
    model = pico_puzzle("kv4+w48", "kv2win4s2+w48", "kv1win3+w16")
    tokens_BT = random_tokens(2, 24)
    positions_BT = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    with torch.no_grad():
        packed = model(tokens_BT, position_ids=positions_BT, use_cache=False).logits
        first = model(tokens_BT[:, :10], use_cache=False).logits
        second = model(tokens_BT[:, 10:], use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat([first, second], 1))


def test_shares_are_all_of_a_batch_and_an_empty_one_counts_nothing() -> None:
    tokens_BT = torch.arange(10).reshape(5, 2)
    batch, device = Batch("", tokens_BT, tokens_BT + 1, tokens_BT + 2), torch.device("cpu")
    for size in (1, 2, 3, 5, 7):
        shares = [batch.share(Group(rank, size), device) for rank in range(size)]
        counted = [share for share in shares if share.counted]
        assert torch.equal(torch.cat([share.tokens_BT for share in counted]), tokens_BT)
        assert all(torch.equal(share.tokens_BT, tokens_BT[share.first :][: len(share.tokens_BT)]) for share in counted)
        assert all(torch.equal(share.targets_BT, share.tokens_BT + 1) for share in shares)
        assert sum(share.num_tokens for share in shares) == batch.num_tokens
        assert all(len(share.tokens_BT) for share in shares)


def test_a_batch_that_cannot_be_shared_is_refused_with_what_can(
    pico_data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "current", lambda: Group(0, 5))
    with pytest.raises(PuzzleError, match=r"parts of 12 .* by 5 processes; start 1, 2, 3, 4, 6, 12 of them"):
        batches(pico_data, batch_size=24, accumulate=2)
