"""What goes in comes out: documents, chats and the end of a token budget, in one range without shares."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from puzzle.data import packing, sources
from puzzle.parents import Parent
from puzzle.recipe import DataSettings

Pack = Callable[..., NDArray[np.uint32]]
WriteRows = Callable[[str, list[object]], Path]


@pytest.fixture(scope="module")
def encoder(parent: Parent) -> packing.Encoder:
    return packing.Encoder(parent.tokenizer(), parent.config.vocab_size)


@pytest.fixture
def pack(encoder: packing.Encoder, tmp_path: Path) -> Pack:
    """A source's tokens in sequences of one token, so that none is dropped."""

    def pack(source: Path, column: str = "text", max_tokens: int | None = None) -> NDArray[np.uint32]:
        found = sources.open_sources(DataSettings(source=str(source), column=column), tmp_path / "memory.json")
        folder = tmp_path / f"packed-{max_tokens}"
        folder.mkdir()
        packing.pack(found.parts, encoder, folder, bounds={"training": 1.0}, sequence_length=0, max_tokens=max_tokens)
        return np.fromfile(folder / "training.bin", "<u4")

    return pack


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_text_comes_back_as_it_was(encoder: packing.Encoder, documents: list[str]) -> None:
    encoded = np.concatenate(encoder.encode(documents, is_chat=False))
    assert encoder.tokenizer.decode(encoded) == "".join("<bos>" + text + "<eos>" for text in documents)


def test_chat_goes_through_the_template(pack: Pack, encoder: packing.Encoder, write_rows: WriteRows) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "ok <eos>"}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "on the mat"}]},
    ]
    tokens = pack(write_rows("chat.jsonl", rows), column="messages")
    # BOS is the template's alone, and an EOS that it gives is not doubled.
    assert encoder.tokenizer.decode(tokens) == "<bos>[user]sit[assistant]ok <eos><bos>[user]on the mat<eos>"


def test_text_and_chat_in_one_column(pack: Pack, encoder: packing.Encoder, write_rows: WriteRows) -> None:
    rows = [{"text": "cat"}, {"text": [{"role": "user", "content": "dog"}]}, {"text": "log"}]
    tokens = pack(write_rows("mixed.jsonl", rows))
    assert encoder.tokenizer.decode(tokens) == "<bos>cat<eos><bos>[user]dog<eos><bos>log<eos>"


def test_half_a_surrogate_pair_is_replaced(pack: Pack, encoder: packing.Encoder, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "cat \\ud83d sat"}\n')
    assert encoder.tokenizer.decode(pack(tmp_path / "broken.jsonl")) == "<bos>cat ? sat<eos>"


def test_empty_documents_leave_nothing(pack: Pack, encoder: packing.Encoder, write_rows: WriteRows) -> None:
    rows = [{"text": ""}, {"text": "cat"}, {"text": " \n"}, {"text": None}]
    assert encoder.tokenizer.decode(pack(write_rows("gaps.jsonl", rows))) == "<bos>cat<eos>"


@pytest.mark.parametrize("batch_characters", [1, 300, 2**20])
def test_max_tokens_stops_after_the_document_that_reaches_it(
    pack: Pack, encoder: packing.Encoder, corpus: Path, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    everything = pack(corpus)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", batch_characters)
    limited = pack(corpus, max_tokens=300)
    ends = 1 + np.flatnonzero(everything == encoder.eos_token_id)
    np.testing.assert_array_equal(limited, everything[: ends[ends >= 300].min()])
