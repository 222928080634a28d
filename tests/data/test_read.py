"""Files, folders and datasets: what is read, in which order, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from puzzle.data.read import Document, Source, open_sources
from puzzle.errors import PuzzleError
from puzzle.recipe import DataSettings
from puzzle.runs import remembered

WriteRows = Callable[[str, list[object]], Path]
Open = Callable[..., list[Source]]
Read = Callable[..., list[Document]]


@pytest.fixture
def open_named(tmp_path: Path) -> Open:
    def open_named(*names: object, **settings: Any) -> list[Source]:
        return open_sources(DataSettings(source=list(map(str, names)), **settings), tmp_path / "memory.json")

    return open_named


@pytest.fixture
def read(open_named: Open) -> Read:
    """All documents of sources."""

    def read(*names: object, start: int = 0, **settings: Any) -> list[Document]:
        return [document for source in open_named(*names, **settings) for document in source.documents(start)]

    return read


def contents(documents: list[Document]) -> list[object]:
    return [document.content for document in documents]


def refused(read: Read, name: object, match: str, **settings: Any) -> None:
    with pytest.raises(PuzzleError, match=match) as caught:
        read(name, **settings)
    assert "\n" not in str(caught.value)


RUN = ("runs/my/puzzle.json", "runs/my/log.txt", "runs/my/child/README.md")
"""A run folder, whose files are no text."""


def test_folder_is_walked_in_sorted_order(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for name in ("b.md", "a/z.TXT", "a/b/c.py", "z.rst", ".git/hidden.txt", "a/.hidden.txt", "image.png", *RUN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert contents(read(folder)) == ["a/b/c.py", "a/z.TXT", "b.md", "z.rst"]
    assert contents(read(folder / "z.rst", folder / "b.md")) == ["z.rst", "b.md"]


def test_text_is_kept_as_it_is_but_for_a_byte_order_mark(read: Read, tmp_path: Path) -> None:
    text = "one\r\ntwo\n\nthree \u2028 four\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "full.txt").write_text("12345678901234\r\n" * (2**18 // 16))  # 256 KiB are one document
    assert contents(read(tmp_path / "a.txt")) == [text]
    assert len(read(tmp_path / "full.txt")) == 1


@pytest.mark.parametrize("line", ["a short line\n", "a line with \u00fc and \U0001f600\r\n", "\u00e9" * 500_000])
def test_large_file_is_cut_at_line_ends(read: Read, tmp_path: Path, line: str) -> None:
    text = line * (600 * 1024 // len(line.encode()) + 1)
    (tmp_path / "large.txt").write_bytes(text.encode())
    documents = read(tmp_path / "large.txt")
    pieces = [str(document.content) for document in documents]
    assert sum(document.size for document in documents) == len(text.encode())
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 2 * 256 * 1024 for piece in pieces)
    assert len(pieces) > 1
    assert not line.endswith("\n") or all(piece.endswith("\n") for piece in pieces)


def test_jsonl(read: Read, write_rows: WriteRows) -> None:
    path = write_rows("a.jsonl", [{"text": "one"}, {"text": "two", "more": 1}, {"text": None}, {"text": "four"}])
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert contents(read(path)) == ["one", "two", "", "four"]
    assert contents(read(path, start=2)) == ["", "four"]
    assert read(path)[1].place == f"{path}:3"


def test_parquet(read: Read, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"text": [f"row {n}" for n in range(600)], "chat": [chat] * 600, "id": range(600)})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=100)
    assert contents(read(path)) == [f"row {n}" for n in range(600)]
    assert contents(read(path, start=590)) == [f"row {n}" for n in range(590, 600)]
    assert contents(read(path, column="chat"))[0] == chat
    assert sum(document.size for document in read(path)) == pytest.approx(path.stat().st_size)
    refused(read, path, "a.parquet row 0 has no column 'body'; it has chat, id, text", column="body")
    refused(read, path, "a.parquet row 0 holds a int in 'id' that is neither text nor", column="id")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    refused(read, path, "data.source: reading stopped at .*a.parquet row 0: ")
    path.write_bytes(b"PAR1 and no more than that")
    refused(read, path, "a.parquet cannot be loaded: ")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "cut', r"a.jsonl:2 is not valid JSON \(Unterminated string.*correct or delete the line"),
        ('{"text": "\udcff"}', r"a.jsonl is not UTF-8 text \('utf-8' codec can't decode byte 0xff"),
        ('{"text": "a\0"}', r"a.jsonl is not UTF-8 text \(it holds NULs\); convert it or move it away"),
        ('{"text": "a", "text": "b"}', r"a.jsonl:2 is not valid JSON \(text is given twice\)"),
        ('{"body": 1, "id": 2}', "a.jsonl:2 has no column 'text'; it has body, id: name one of those"),
        ("{}", "a.jsonl:2 has no column 'text'; it has none"),
        ('["text"]', "a.jsonl:2 is a list, not an object with a column 'text'"),
        ('{"text": 7}', "a.jsonl:2 holds a int in 'text' that is neither text nor a list of messages"),
        ('{"text": [{"from": "human", "value": "hi"}]}', "a.jsonl:2 holds a list in 'text' that is neither"),
    ],
)
def test_bad_lines(read: Read, tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line.encode(errors="surrogateescape") + b"\n")
    refused(read, tmp_path / "a.jsonl", match)


@pytest.mark.parametrize("data", ["Gr\u00fc\u00dfe".encode("latin-1"), "Gr\u00fc".encode()[:-1]])
def test_text_that_is_not_utf8(read: Read, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "latin.txt").write_bytes(data)
    (tmp_path / "more.md").write_bytes(data)
    refused(read, tmp_path, r"2 files cannot be read, .*latin.txt, .*more.md; the first: .*latin.txt is not UTF-8 text")
    (tmp_path / "more.md").unlink()
    refused(read, tmp_path, r"latin.txt is not UTF-8 text \('utf-8' codec can't.*\); convert it or move it away")


def test_many_files_that_are_wrong_alike_are_named_together(read: Read, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_text('{"body": "a"}\n')
    expected = (
        r"20 files cannot be read, .*00.jsonl, .*01.jsonl, .*02.jsonl, ...; the first: .*00.jsonl:1 has no column"
    )
    refused(read, tmp_path, expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(read: Read, tmp_path: Path, encoding: str, end: str) -> None:
    text, file = "one Gr\u00fc\u00dfe\u2028two", tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False)] * 2
    file.write_bytes(f"{end.join(lines)}{end}".encode(encoding))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    if encoding == "utf-16-le":  # without a mark
        refused(read, tmp_path, "2 files cannot be read.*the first: .*a.txt is not UTF-8 text")
    else:
        assert contents(read(tmp_path)) == [text] * 3


def test_a_pipe_is_no_source(read: Read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(read, tmp_path / "pipe", "pipe is a pipe or a device, and text is read more than once; name a file")


def test_conversations_written_as_json_are_found(read: Read, write_rows: WriteRows) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows: list[object] = [{"text": text} for text in (json.dumps(chat), "[1, 2]", "[1, 2", "[]")]
    assert contents(read(write_rows("rows.jsonl", rows))) == [chat, "[1, 2]", "[1, 2", []]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gone.jsonl", "data.source: gone.jsonl does not exist"),
        ("./gone", "data.source: ./gone does not exist"),
        ("{}/empty", r"empty holds nothing to read \(no files\)"),
        ("{}/pictures", r"pictures holds nothing to read \(.png\); read are .txt,"),
        ("{}/pictures/cat.png", r"cat.png holds nothing to read \(.png\); read are .txt,"),
    ],
)
def test_nothing_to_read(read: Read, tmp_path: Path, name: str, match: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"png")
    refused(read, name.format(tmp_path), match)


def test_identity_follows_contents_and_hashes_once(open_named: Open, tmp_path: Path) -> None:
    memory, file = tmp_path / "memory.json", tmp_path / "notes" / "a.txt"
    file.parent.mkdir()
    file.write_text("one")
    (first,) = open_named(file.parent)
    with remembered(memory) as known:
        known |= {name: "remembered" for name, value in known.items() if value == first.identity[1]} | {"more": ""}
    assert open_named(file.parent)[0].identity == ["a.txt", "remembered"]
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert open_named(file.parent)[0].identity[1] not in (first.identity[1], "remembered")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub whose every dataset has four rows, and a new commit after each call; the calls it got."""
    calls: list[dict[str, Any]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        calls.append({"name": name, "config": config, **options})
        if name == "some/broken":
            raise ValueError("Config name is missing.\nPlease pick one")
        rows = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(4)], "id": range(4)})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    def dataset_info(_: object, name: str, revision: str) -> Any:
        if name == "some/gone":
            raise OSError("404:\nnot found")
        return SimpleNamespace(sha=f"{revision}-{len(calls)}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    return calls


@pytest.mark.parametrize(
    ("source", "config", "split", "revision"),
    [
        ("some/data", None, "train", "main-0"),
        ("some/data:english", "english", "train", "main-0"),
        ("data:english:train[:10%]", "english", "train[:10%]", "main-0"),
        ("some/data@v2::test", None, "test", "v2-0"),
        ("some/data@" + "ab" * 20, None, "train", "ab" * 20),
    ],
)
def test_dataset_names(
    read: Read, hub: list[dict[str, Any]], source: str, config: str | None, split: str, revision: str
) -> None:
    assert contents(read(source, start=1)) == ["row 1", "row 2", "row 3"]
    name = source.partition(":")[0].partition("@")[0]
    assert hub == [{"name": name, "config": config, "split": split, "revision": revision, "streaming": False}]


def test_dataset_is_streamed_under_a_limit_and_stays_at_its_first_commit(
    hub: list[dict[str, Any]], open_named: Open, read: Read, tmp_path: Path
) -> None:
    first = open_named("some/data", max_tokens=100)[0].identity
    assert not hub, "opened late"
    places = [document.place for document in read("some/data", start=2, max_tokens=100)]
    assert places == ["some/data row 2", "some/data row 3"]
    assert hub[0]["streaming"]
    assert open_named("some/data")[0].identity == first  # one call later, `main` is another commit
    (tmp_path / "memory.json").unlink()
    assert open_named("some/data")[0].identity != first


@pytest.mark.usefixtures("hub")
def test_dataset_errors(read: Read) -> None:
    refused(read, "some/data", "some/data row 0 has no column 'body'; it has id, text: name one", column="body")
    refused(read, "some/broken", "dataset some/broken cannot be loaded: Config name is missing. Please pick one")
    refused(read, "some/gone", r"some/gone is no file .* the hub gives no such dataset \(404: not found\)")


def test_parts_of_a_message_are_joined(read: Read, tmp_path: Path) -> None:
    """What has no content has none; what is no text is refused."""
    file = tmp_path / "chat.jsonl"
    asked = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "tool_calls": []}]
    file.write_text(json.dumps({"text": messages}) + "\n")
    assert contents(read(file)) == [[{"role": "user", "content": "a b"}, {"role": "assistant", "tool_calls": []}]]
    file.write_text(json.dumps({"text": [{"role": "user", "content": [*asked, {"type": "image"}]}]}) + "\n")
    refused(read, file, "chat.jsonl:1 has a message with a part 'image'; only text is read: delete it")
