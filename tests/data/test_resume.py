"""Law 11 for tokenising: cut off at any moment and resumed, the bytes are those of one left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puzzle.data import RANGES, TokenData, packing, prepare_data
from puzzle.errors import PuzzleError
from puzzle.parents import Parent

Prepare = Callable[..., TokenData]


class CutOffError(Exception):
    """Stands for kill -9."""


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, until it has been called `calls` times."""
    left = [calls]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise CutOffError
        left[0] -= 1
        return function(*args, **kwargs)

    return call


def contents(data: TokenData) -> list[bytes]:
    return [(data.path / f"{name}.bin").read_bytes() for name in RANGES]


@pytest.fixture
def sources(corpus: Path, tmp_path: Path) -> list[str]:
    """The corpus between small files, so that batches go across parts."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"note {number}: the dog sat on the log\n" * 3)
    return [str(folder), str(corpus), str(folder)]


@pytest.mark.parametrize(
    ("function", "calls", "max_tokens"),
    [
        ("_append", 0, None),
        ("_append", 3, None),
        ("write_json", 4, None),
        ("write_json", 1, 2500),
        ("_truncate", 1, 2500),
    ],
)
def test_resume_gives_identical_bytes(
    open_data_run: Callable[..., Any],
    parent: Parent,
    sources: list[str],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    calls: int,
    max_tokens: int | None,
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 600)
    whole = prepare_data(open_data_run(sources, run="whole", max_tokens=max_tokens), parent)
    run = open_data_run(sources, run="cut", max_tokens=max_tokens)
    with monkeypatch.context() as patch:
        patch.setattr(packing, function, failing_after(calls, getattr(packing, function)))
        with pytest.raises(CutOffError):
            prepare_data(run, parent)
    resumed = prepare_data(run, parent)
    assert contents(resumed) == contents(whole)
    assert resumed.counts == whole.counts


def test_what_was_tokenised_is_not_tokenised_again(
    prepare: Prepare, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 600)
    seen: list[str] = []
    encode = packing.Encoder.encode

    def spy(self: packing.Encoder, texts: list[str], is_chat: bool) -> Any:
        seen.extend(texts)
        return encode(self, texts, is_chat)

    monkeypatch.setattr(packing.Encoder, "encode", spy)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_append", failing_after(3, packing._append))
        with pytest.raises(CutOffError):
            prepare(corpus)
    assert 0 < len(seen) < 60
    prepare(corpus)
    assert len(seen) == len(set(seen)) == 60


def test_files_lost_under_a_record(prepare: Prepare, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_drop_tails", failing_after(0, packing._drop_tails))
        with pytest.raises(CutOffError):
            prepare(corpus)
    (lost,) = corpus.parent.glob("run/stages/data-*/training.bin")
    lost.unlink()
    with pytest.raises(PuzzleError, match=r"training.bin is shorter than its record says; delete its folder"):
        prepare(corpus)
