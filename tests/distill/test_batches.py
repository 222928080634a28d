"""What a step reads: the same tokens however it is cut, and documents that do not see each other."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import pico_puzzle, random_tokens

from puzzle.data import TokenData
from puzzle.distill.batches import Batches, Boundary, find_boundary
from puzzle.errors import PuzzleError
from puzzle.parents import Parent
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

EOS, BOS = 0, 1


def batches(data: TokenData, boundary: Boundary | None = None, **settings: Any) -> Batches:
    return Batches(data, DistilSettings(batch_size=4, tokens=32 * 4 * 10, **settings), 0, boundary)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.sampled_from([None, BOS]))
def test_positions_count_from_the_last_boundary(tokens: list[int], bos: int | None) -> None:
    positions = Boundary(EOS, bos).positions(torch.tensor([tokens]))[0].tolist()
    place = 0
    for index, token in enumerate(tokens):
        begins = index == 0 or (tokens[index - 1] == EOS and (bos is None or token == bos))
        place = 0 if begins else place + 1
        assert positions[index] == place


def test_documents_see_nothing_of_each_other() -> None:
    model = pico_puzzle("kv4+w48", "kv2win4s2+w48", "kv1win3+w16")
    tokens_BT = random_tokens(2, 24)
    tokens_BT[:, 9] = EOS
    positions_BT = Boundary(EOS).positions(tokens_BT)
    with torch.no_grad():
        packed = model(tokens_BT, position_ids=positions_BT, use_cache=False).logits
        first = model(tokens_BT[:, :10], use_cache=False).logits
        second = model(tokens_BT[:, 10:], use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat([first, second], 1))


def test_a_ladder_and_accumulation_read_the_same_tokens(pico_data: TokenData) -> None:
    whole = batches(pico_data)
    cut = batches(pico_data, ladder=0.2, accumulate=2)
    assert whole.steps == cut.steps == 10
    assert [cut.pieces(step) for step in range(10)] == [4, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    for step in (0, 3, 9):
        (expected,), parts = list(whole.training(step)), list(cut.training(step))
        assert [len(part.tokens_BT) for part in parts] == [2 * cut.pieces(step)] * 2
        for name in ("tokens_BT", "targets_BT"):
            assert torch.equal(
                torch.cat([getattr(part, name).flatten() for part in parts]), getattr(expected, name).flatten()
            )
    names = [batch.name for step in range(10) for batch in cut.training(step)]
    assert len(set(names)) == 20


def test_sequences_that_cannot_be_cut_are_refused(pico_data: TokenData) -> None:
    with pytest.raises(PuzzleError, match="sequence_length 30 cannot be cut"):
        batches(replace(pico_data, sequence_length=30), ladder=0.1)


@dataclass
class FakeTokenizer:
    eos_token_id: int
    bos_token_id: int | None


@dataclass
class FakeParent:
    """Its tokenizer alone."""

    found: FakeTokenizer

    def tokenizer(self) -> FakeTokenizer:
        return self.found


@dataclass
class FakeRun:
    warnings: list[str] = field(default_factory=list)

    def log_warning(self, line: str) -> None:
        self.warnings.append(line)


def test_eos_is_the_boundary_of_text_that_has_one_a_document(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData
) -> None:
    assert find_boundary(pico_run, pico_parent, pico_data) == Boundary(pico_parent.tokenizer().eos_token_id)


def test_bos_makes_the_boundary_where_documents_start_with_it(pico_data: TokenData) -> None:
    first = int(pico_data.sequences("validation", [0])[0, 0])
    run, parent = FakeRun(), FakeParent(FakeTokenizer(EOS, first))
    assert find_boundary(run, parent, pico_data) == Boundary(EOS, first)  # type: ignore[arg-type]


def test_eos_after_every_turn_is_no_boundary(pico_data: TokenData) -> None:
    tokens = pico_data.sequences("validation", slice(None))
    frequent = int(tokens.mode().values.mode().values)
    run, parent = FakeRun(), FakeParent(FakeTokenizer(frequent, None))
    assert find_boundary(run, parent, pico_data) is None  # type: ignore[arg-type]
    assert "attend across" in run.warnings[0]
