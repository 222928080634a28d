"""What goes in comes out; and law 11: cut off at any moment and resumed, the bytes are those of one left alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from puzzle.data import packing
from puzzle.data.documents import Document
from puzzle.data.sources import Source, open_sources
from puzzle.parents import Parent
from puzzle.recipe import DataSettings

Pack = Callable[..., NDArray[np.uint32]]
WriteRows = Callable[[str, list[object]], Path]


@pytest.fixture(scope="module")
def encoder(parent: Parent) -> packing.Encoder:
    return packing.Encoder(parent.tokenizer(), parent.config.vocab_size)


@pytest.fixture
def pack(encoder: packing.Encoder, tmp_path: Path) -> Pack:
    """A source's tokens, all of them training, in sequences of one token, so that none is dropped."""

    def pack(source: Path, column: str = "text", max_tokens: int | None = None) -> NDArray[np.uint32]:
        found = open_sources(DataSettings(source=[str(source)], column=column), tmp_path / "memory.json")
        folder = tmp_path / f"packed-{max_tokens}"
        pieces = packing.tokenise(found, encoder, folder, {"training": 1.0}, max_tokens)
        packing.join(folder, pieces, folder, 0)
        return np.fromfile(folder / "training.bin", "<u4")

    return pack


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 300)


def test_any_text_comes_back_as_it_was(encoder: packing.Encoder, tmp_path: Path) -> None:
    @settings(max_examples=25, deadline=None)
    @given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        documents = [packing._Text(text, False, packing._Position()) for text in texts]
        tokens = np.concatenate(encoder.encode(documents))
        assert encoder.tokenizer.decode(tokens) == "".join("<bos>" + text + "<eos>" for text in texts)

    check()


def test_chat_goes_through_the_template(pack: Pack, encoder: packing.Encoder, write_rows: WriteRows) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "ok <eos>"}]},
        {"messages": []},
        {"messages": "a plain text"},
        {"messages": [{"role": "user", "content": "on the mat"}]},
    ]
    tokens = pack(write_rows("chat.jsonl", rows), column="messages")
    # BOS is the template's alone, and an EOS that it gives is not doubled.
    assert encoder.tokenizer.decode(tokens) == (
        "<bos>[user]sit[assistant]ok <eos><bos>a plain text<eos><bos>[user]on the mat<eos>"
    )


def test_empty_documents_and_half_a_surrogate_pair(pack: Pack, encoder: packing.Encoder, tmp_path: Path) -> None:
    lines = ['{"text": ""}', '{"text": "cat \\ud83d sat"}', '{"text": " \\n"}', '{"text": null}']
    (tmp_path / "gaps.jsonl").write_text("\n".join(lines))
    assert encoder.tokenizer.decode(pack(tmp_path / "gaps.jsonl")) == "<bos>cat ? sat<eos>"


@pytest.mark.usefixtures("small_batches")
def test_max_tokens_stops_after_the_document_that_reaches_it(
    pack: Pack, encoder: packing.Encoder, corpus: Path
) -> None:
    everything = pack(corpus)
    ends = 1 + np.flatnonzero(everything == encoder.tokenizer.eos_token_id)
    np.testing.assert_array_equal(pack(corpus, max_tokens=300), everything[: ends[ends >= 300].min()])


class CutOffError(Exception):
    """Stands for kill -9."""


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("cut", "max_tokens"), [(0, None), (17, None), (59, None), (5, 7000)])
def test_a_resumed_run_goes_on_with_the_next_batch(
    encoder: packing.Encoder, corpus: Path, tmp_path: Path, cut: int, max_tokens: int | None
) -> None:
    whole = open_sources(DataSettings(source=[str(corpus)] * 2), tmp_path / "memory.json")
    starts: list[int] = []

    def documents(start: int) -> Iterator[Document]:
        starts.append(start)
        for number, document in enumerate(whole[1].documents(start), start):
            if number == cut and len(starts) == 1:
                raise CutOffError
            yield document

    def contents(folder: Path, sources: list[Source]) -> list[bytes]:
        bounds = {"test": 0.3}
        pieces = packing.tokenise(sources, encoder, folder / "pieces", bounds, max_tokens)
        packing.join(folder / "pieces", pieces, folder, 8)
        return [file.read_bytes() for file in sorted(folder.glob("*.bin"))]

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    cut_off = [whole[0], replace(whole[1], documents=documents)]
    with pytest.raises(CutOffError):
        contents(tmp_path / "cut", cut_off)
    (tmp_path / "cut" / "test.bin").write_bytes(b"left by a joining that was cut off")
    assert contents(tmp_path / "cut", cut_off) == contents(tmp_path / "whole", whole)
    assert cut - 15 < starts[1] <= cut, "what was tokenised is not read again"
