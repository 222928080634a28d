"""What a step reads: the same tokens however it is cut and shared out, and documents that do not see each other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conftest import Waits, pico_puzzle, random_tokens

from puzzle.data import TokenData
from puzzle.distill.gkd import Batches
from puzzle.distill.teacher import Batch
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleMasks
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

ALONE = Group(0, 1)
Open = Callable[..., Batches]


@pytest.fixture
def batches(pico_run: Run, pico_data: TokenData) -> Open:
    """What a process reads under these settings of `distil`."""

    def make(group: Group = ALONE, **settings: Any) -> Batches:
        distil = DistilSettings.model_validate({"batch_size": 4, "tokens": 32 * 4 * 10} | settings)
        recipe = pico_run.recipe.model_copy(update={"distil": distil})
        return Batches(replace(pico_run, recipe=recipe), pico_data, group)

    return make


def assert_together(parts: list[Batch], whole: Batch) -> None:
    """The parts are the whole; positions are not given where every sequence is of one document."""
    for name in ("tokens_BT", "targets_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    positions = [
        torch.arange(32).expand_as(part.tokens_BT) if part.positions_BT is None else part.positions_BT
        for part in [*parts, whole]
    ]
    assert torch.equal(torch.cat(positions[:-1]), positions[-1])


def test_parts_of_a_step_read_what_the_step_reads(batches: Open, pico_run: Run, pico_data: TokenData) -> None:
    whole, parts = batches(), batches(accumulate=2)
    assert whole.steps == parts.steps == 10
    for step in (0, 9):
        (expected,), found = list(whole.training(step)), list(parts.training(step))
        assert_together(found, expected)
        assert torch.equal(expected.tokens_BT, pico_data.training_batch(step, 4, pico_run.recipe.seed)[:, :-1])
    assert len({batch.name for batch in parts}) == len(list(parts)) == 20 + len(list(parts.validation()))


def test_validation_is_the_first_of_its_range(batches: Open, pico_data: TokenData) -> None:
    read = list(batches(validation_tokens=32 * 6).validation())
    assert [len(batch.tokens_BT) for batch in read] == [4, 2]
    found = torch.cat([batch.tokens_BT for batch in read])
    assert torch.equal(found, pico_data.sequences("validation", slice(0, 6))[:, :-1])


def test_documents_see_nothing_of_each_other() -> None:
    model = pico_puzzle("kv4+w48", "kv2win4s2+w48", "kv1win3+w16")
    tokens_BT = random_tokens(2, 24)
    positions_BT = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    with torch.no_grad():
        masks = PuzzleMasks(model.config, torch.empty(2, 24, 32), None, positions_BT, None, packed=True)
        packed = model(tokens_BT, position_ids=positions_BT, use_cache=False).logits
        with Waits() as waits:
            known = model(tokens_BT, masks, positions_BT, use_cache=False).logits
        first = model(tokens_BT[:, :10], use_cache=False).logits
        second = model(tokens_BT[:, 10:], use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat([first, second], 1))
    assert torch.equal(known, packed)
    assert not waits.count


@pytest.mark.parametrize("size", [2, 4])
def test_shares_are_all_of_a_batch_and_an_empty_one_counts_nothing(size: int, batches: Open) -> None:
    """Nine held-out sequences: of the last one, all shares but one are empty."""
    asked = {"validation_tokens": 32 * 9}
    own = [list(batches(Group(rank, size), **asked)) for rank in range(size)]
    for whole, *shares in zip(batches(**asked), *own, strict=True):
        counted = [share for share in shares if share.counted]
        assert [share.first for share in counted] == list(range(0, len(whole.tokens_BT), len(counted[0].tokens_BT)))
        assert_together(counted, whole)
        assert {share.name for share in shares} == {whole.name}
        assert sum(share.num_tokens for share in shares) == whole.num_tokens
        assert all(len(share.tokens_BT) and share.first < len(whole.tokens_BT) for share in shares)


def test_a_batch_that_cannot_be_shared_is_refused_with_what_can(batches: Open) -> None:
    with pytest.raises(PuzzleError, match=r"parts of 12 .* by 5 processes; start 1, 2, 3, 4, 6, 12 of them"):
        batches(Group(0, 5), batch_size=24, accumulate=2)
