"""The stage: what goes in comes out, in disjoint ranges, the same each time, also cut off at any moment (law 11)."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.conftest import TEXTS
from transformers import AutoTokenizer

from puzzle.data import RANGES, TokenData, pack
from puzzle.errors import PuzzleError
from puzzle.parents import Parent, open_parent

Prepare = Callable[..., TokenData]
Texts = Callable[..., list[str]]
WriteRows = Callable[[str, list[object]], Path]
CHAT = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "ok <eos>"}]


def num_documents(data: TokenData, name: str) -> int:
    return len(np.fromfile(data.path / f"{name}.ends.bin", np.int64))


def contents(data: TokenData) -> list[bytes]:
    return [(data.path / f"{name}{suffix}").read_bytes() for name in RANGES for suffix in (".bin", ".ends.bin")]


def test_every_document_is_in_one_range(prepare: Prepare, texts: Texts, corpus: Path) -> None:
    data = prepare(corpus)
    found = {name: set(texts(data, name)) & {*TEXTS} for name in RANGES}
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert sum(num_documents(data, name) for name in RANGES) == 60
    assert len(set.union(*found.values())) >= 60 - len(RANGES)  # each range may lose its end


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=20))
def test_any_text_comes_back_as_it_was(
    prepare: Prepare, texts: Texts, write_rows: WriteRows, tmp_path: Path, given: list[str]
) -> None:
    source = write_rows("any.jsonl", [{"text": text} for text in [*given, *TEXTS]])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    data = prepare(source)
    assert {*given} <= {text for name in RANGES for text in texts(data, name)}


def test_chat_empty_documents_and_half_a_surrogate_pair(prepare: Prepare, texts: Texts, tmp_path: Path) -> None:
    rows = [{"text": CHAT}, {"text": []}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "cat \ud83d sat"}]
    source = tmp_path / "gaps.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in [*rows, *({"text": text} for text in TEXTS)]))
    data = prepare(source)
    assert sum(num_documents(data, name) for name in RANGES) == 2 + 60
    found = [text for name in RANGES for text in texts(data, name)]
    assert {"[user]sit[assistant]ok ", "cat ? sat"} <= {*found}
    assert "" not in found, "an EOS that the template gives is not doubled, nor its BOS"


@pytest.mark.parametrize("asked", [False, True])
def test_special_tokens_in_plain_text_are_text_unless_asked(
    prepare: Prepare, parent: Parent, write_rows: WriteRows, asked: bool
) -> None:
    tokenizer = parent.tokenizer()
    data = prepare(write_rows("s.jsonl", [{"text": f"<bos>{text}<eos>"} for text in TEXTS]), special_tokens=asked)
    tokens = np.concatenate([data.sequences(name, slice(None)).flatten().numpy() for name in RANGES])
    documents = sum(num_documents(data, name) for name in RANGES)
    assert documents == 60
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # one of each a document, less what is cut off
        assert documents - 10 <= int((tokens == token).sum()) <= documents


def test_shares_of_documents_and_copies(prepare: Prepare, write_rows: WriteRows) -> None:
    rows = [{"text": f"{number % 3000} sat"} for number in range(6000)]
    data = prepare(write_rows("many.jsonl", rows), calibration=0.1, validation=0.2, scoring=0.2, test=0.3)
    documents = np.array([num_documents(data, name) for name in RANGES])
    np.testing.assert_allclose(documents / 6000, [0.1, 0.2, 0.2, 0.2, 0.3], atol=0.03)  # four standard errors
    assert not (documents % 2).any(), "copies of a document share a range"


def test_the_stage_depends_on_contents_alone_and_is_only_opened_again(
    prepare: Prepare, corpus: Path, tmp_path: Path
) -> None:
    first = prepare(corpus)
    (tmp_path / "elsewhere").mkdir()
    second = prepare(shutil.copy(corpus, tmp_path / "elsewhere"), run="second")
    assert (first.address, contents(first)) == (second.address, contents(second))
    written = (first.path / "training.bin").stat().st_mtime_ns
    assert prepare(corpus) == first
    assert (first.path / "training.bin").stat().st_mtime_ns == written
    (first.path / "training.bin").unlink()
    with pytest.raises(PuzzleError, match=r"training.bin is missing; delete .*stages/data-\w+, and only that"):
        prepare(corpus)


@pytest.mark.parametrize("change", [{"sequence_length": 8}, {"max_tokens": 1200}, {"test": 0.2}, {"column": "body"}])
def test_settings_that_matter_change_the_address(
    prepare: Prepare, write_rows: WriteRows, change: dict[str, object]
) -> None:
    source = write_rows("two.jsonl", [{"text": text, "body": f"body of {text}"} for text in TEXTS])
    assert prepare(source).address != prepare(source, **change).address


def test_positions_count_from_the_first_token_of_each_document(
    prepare: Prepare, parent: Parent, write_rows: WriteRows
) -> None:
    """Also where a document holds the EOS token itself."""
    rows = [{"text": f"{n}: the cat <eos> sat on the mat" * (1 + n % 7)} for n in range(90)]
    data = prepare(write_rows("eos.jsonl", rows), special_tokens=True)
    lengths = {len(ids) + 1 for ids in parent.tokenizer()([row["text"] for row in rows])["input_ids"]}
    ends = np.fromfile(data.path / "training.ends.bin", np.int64)
    assert set(np.diff(ends, prepend=0)) <= lengths
    expected = np.zeros(data.num_sequences("training") * 17, dtype=np.int64)
    begin = 0
    for index in range(len(expected)):
        begin = index if index % 17 == 0 or index in ends else begin
        expected[index] = index - begin
    assert data.positions("training", slice(None)).flatten().tolist() == expected.tolist()
    assert data.positions("training", [3, 1]).tolist() == expected.reshape(-1, 17)[[3, 1]].tolist()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_BATCH_CHARACTERS", 300)


@pytest.mark.usefixtures("small_batches")
def test_max_tokens_stops_after_the_document_that_reaches_it(prepare: Prepare, parent: Parent, corpus: Path) -> None:
    ends = np.cumsum([len(ids) + 1 for ids in parent.tokenizer()(TEXTS)["input_ids"]])
    data = prepare(corpus, max_tokens=2000)
    assert sum(num_documents(data, name) for name in RANGES) == 1 + np.sum(ends < 2000)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("cut", "max_tokens"), [(1, None), (17, None), (59, None), (5, 7000)])
def test_a_resumed_run_goes_on_with_the_next_batch(
    prepare: Prepare, corpus: Path, tmp_path: Path, cut: int, max_tokens: int | None
) -> None:
    """What kills it is a bad line in the second of two files, which is mended so that nobody notices."""
    second = Path(shutil.copy(corpus, tmp_path / "second.jsonl"))
    whole = prepare([corpus, second], run="whole", max_tokens=max_tokens)
    lines = corpus.read_bytes().splitlines(keepends=True)
    times = {"ns": (second.stat().st_atime_ns, second.stat().st_mtime_ns)}
    second.write_bytes(b"".join([*lines[:cut], b"!" + lines[cut][1:], *lines[cut + 1 :]]))
    os.utime(second, **times)
    with pytest.raises(PuzzleError, match="not valid JSON"):
        prepare([corpus, second], max_tokens=max_tokens)
    (record,) = (tmp_path / "run").rglob("position.json")
    position = json.loads(record.read_text())
    assert cut - 15 < position["document"] + 60 * (position["source"] - 1) <= cut, "what was done is not done again"
    with record.with_name("test.bin").open("ab") as file:
        file.write(b"left by a batch that was cut off")
    second.write_bytes(b"".join(lines))
    os.utime(second, **times)
    assert contents(prepare([corpus, second], max_tokens=max_tokens)) == contents(whole)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scoring": 1e-9}, "scoring gets 0 of 60 documents, .*17 tokens; raise data.scoring"),
        ({"sequence_length": 5000}, "one sequence of 5001 tokens; .* lower data.sequence_length"),
        ({"test": 0.549999999}, "training gets 0 of 60 .* lower the other shares"),
    ],
)
def test_range_left_empty(prepare: Prepare, corpus: Path, change: dict[str, object], match: str) -> None:
    with pytest.raises(PuzzleError, match=match):
        prepare(corpus, **change)


def test_no_text(prepare: Prepare, write_rows: WriteRows) -> None:
    with pytest.raises(PuzzleError, match=r"blank.jsonl holds no text; its documents are all empty"):
        prepare(write_rows("blank.jsonl", [{"text": " \n"}, {"text": None}]))


def without_eos(path: Path) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def more_tokens(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([*(f"[{number}]" for number in range(300)), "[user]"])
    tokenizer.save_pretrained(path)


def strict_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (without_eos, "tokenizer has no EOS token"),
        (more_tokens, r"gives token \d+, its config.json has vocab_size 300"),
        (strict_template, "chat.jsonl:1 fits no chat template: roles must alternate"),
        (lambda path: (path / "chat_template.jinja").unlink(), "chat.jsonl:1 holds messages, .* has no chat template"),
    ],
)
def test_a_tokenizer_that_does_not_fit(
    prepare: Prepare, parent: Parent, write_rows: WriteRows, tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    path = Path(shutil.copytree(parent.path, tmp_path / "damaged"))
    damage(path)
    with pytest.raises(PuzzleError, match=match):
        prepare(write_rows("chat.jsonl", [{"text": CHAT}]), parent=open_parent(str(path)))


def test_tokenizer_is_part_of_the_address(prepare: Prepare, parent: Parent, corpus: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(parent.path, tmp_path / "other"))
    with (path / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert prepare(corpus).address != prepare(corpus, parent=open_parent(str(path))).address
