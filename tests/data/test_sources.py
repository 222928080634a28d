"""Files, folders and datasets: what is read, in which order, and what is refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puzzle.data import documents, sources
from puzzle.data.documents import Document
from puzzle.errors import PuzzleError
from puzzle.recipe import DataSettings

WriteRows = Callable[[str, list[object]], Path]


def open_sources(source: object, memory: Path, **settings: object) -> sources.Sources:
    return sources.open_sources(DataSettings.model_validate({"source": source, **settings}), memory)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Document]]:
    """All documents of a source."""

    def read(source: object, start: int = 0, **settings: object) -> list[Document]:
        wanted = [str(item) for item in source] if isinstance(source, list) else str(source)
        found = open_sources(wanted, tmp_path / "memory.json", **settings)
        return [document for part in found.parts for document in part.documents(start)]

    return read


Read = Callable[..., list[Document]]


def refused(read: Read, source: object, match: str, **settings: object) -> None:
    with pytest.raises(PuzzleError, match=match) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)


def test_folder_is_walked_in_sorted_order(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    names = ("b.md", "a/z.TXT", "a/b/c.py", "z.rst", ".git/hidden.txt", "a/.hidden.txt", "image.png")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert [document.content for document in read(folder)] == ["a/b/c.py", "a/z.TXT", "b.md", "z.rst"]
    assert [document.content for document in read([folder / "z.rst", folder / "b.md"])] == ["z.rst", "b.md"]


def test_text_is_kept_as_it_is_but_for_a_byte_order_mark(read: Read, tmp_path: Path) -> None:
    text = "one\r\ntwo\n\nthree \u2028 four\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [document.content for document in read(tmp_path / "a.txt")] == [text]


@pytest.mark.parametrize("line", ["a short line\n", "a line with \u00fc and \U0001f600\r\n", "\u00e9" * 500_000])
def test_large_file_is_cut_at_line_ends(read: Read, tmp_path: Path, line: str) -> None:
    text = line * (600 * 1024 // len(line.encode()) + 1)
    (tmp_path / "large.txt").write_bytes(text.encode())
    pieces = [document.content for document in read(tmp_path / "large.txt")]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 2 * 256 * 1024 for piece in pieces)
    assert len(pieces) > 1
    assert not line.endswith("\n") or all(piece.endswith("\n") for piece in pieces)


def test_file_of_256_kib_is_one_document(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345678901234\r\n" * (2**18 // 16))
    assert len(read(tmp_path / "a.txt")) == 1


def test_shares_add_up_to_the_size(tmp_path: Path, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "b.txt").write_text("the cat sat\n" * 50_000)
    found = open_sources([str(tmp_path)], tmp_path / "memory.json")
    for part in found.parts:
        assert sum(document.share for document in part.documents(0)) == part.size


def test_jsonl(read: Read, write_rows: WriteRows) -> None:
    path = write_rows("a.jsonl", [{"text": "one"}, {"text": "two", "more": 1}, {"text": None}, {"text": "four"}])
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert [document.content for document in read(path)] == ["one", "two", "", "four"]
    assert [document.content for document in read(path, start=2)] == ["", "four"]
    assert read(path)[1].place == f"{path}:3"


def test_parquet(read: Read, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"text": [f"row {n}" for n in range(600)], "chat": [chat] * 600, "id": range(600)})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=100)
    assert [document.content for document in read(path)] == [f"row {n}" for n in range(600)]
    assert [document.content for document in read(path, start=590)] == [f"row {n}" for n in range(590, 600)]
    assert read(path, column="chat")[0].content == chat
    refused(read, path, "a.parquet has no column 'body'; it has chat, id, text", column="body")
    refused(read, path, "a.parquet row 0 holds a int in 'id' that is neither text nor", column="id")


def test_damaged_parquet(read: Read, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more than that")
    refused(read, tmp_path / "a.parquet", "a.parquet is not a sound parquet file: ")


def test_parquet_without_the_extra(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(documents, "import_module", missing)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refused(read, tmp_path / "a.parquet", r"needs the package pyarrow: pip install 'puzzle-llm\[data\]'")
    refused(read, "some/dataset", r"no file or folder here; .* needs the package datasets: pip install")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": "cut', r"a.jsonl:2 is not valid JSON \(Unterminated string.*mend or delete the line"),
        ('{"body": 1, "id": 2}', "a.jsonl:2 has no column 'text'; it has body, id: name one of those"),
        ("{}", "a.jsonl:2 has no column 'text'; it has none"),
        ('["text"]', "a.jsonl:2 is a list, not an object with a column 'text'"),
        ('{"text": 7}', "a.jsonl:2 holds a int in 'text' that is neither text nor a list of messages"),
        ('{"text": [{"from": "human", "value": "hi"}]}', "a.jsonl:2 holds a list in 'text' that is neither"),
    ],
)
def test_bad_lines(read: Read, tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    refused(read, tmp_path / "a.jsonl", match)


def test_nothing_there(read: Read, tmp_path: Path) -> None:
    refused(read, tmp_path / "gone", "data.source: .*gone does not exist")
    refused(read, "gone.jsonl", "data.source: gone.jsonl does not exist")
    refused(read, "./gone", "data.source: ./gone does not exist")


def test_nothing_readable(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    refused(read, folder, r"nothing in .*pictures is readable \(no files\)")
    (folder / "cat.png").write_bytes(b"png")
    refused(read, folder, r"nothing in .*pictures is readable \(.png\); those read: .txt,")
    refused(read, folder / "cat.png", "cat.png is of a kind that is not read; those read: .txt,")


def test_not_utf8(read: Read, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    refused(read, tmp_path / "latin.txt", "latin.txt is not UTF-8 text; convert it or move it away")
    (tmp_path / "cut.txt").write_bytes("Gr\u00fc".encode()[:-1])
    refused(read, tmp_path / "cut.txt", "cut.txt is not UTF-8 text")


def test_unreadable(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "_hash_contents", denied)
    (tmp_path / "a.txt").write_text("a")
    refused(read, tmp_path / "a.txt", "a.txt cannot be read: Permission denied")


def test_address_follows_contents_and_hashes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, file = tmp_path / "memory.json", tmp_path / "notes" / "a.txt"
    file.parent.mkdir()
    file.write_text("one")
    hashed: list[Path] = []
    hash_contents = sources._hash_contents
    monkeypatch.setattr(sources, "_hash_contents", lambda path: hashed.append(path) or hash_contents(path))
    first = open_sources(str(file.parent), memory).address
    assert open_sources(str(file.parent), memory).address == first
    assert len(hashed) == 1
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert open_sources(str(file.parent), memory).address != first
    assert len(hashed) == 2


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub whose every dataset has four rows; the calls it got."""
    datasets = pytest.importorskip("datasets")
    calls: list[dict[str, Any]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        calls.append({"name": name, "config": config, **options})
        if name == "some/broken":
            raise ValueError("Config name is missing.\nPlease pick one")
        rows = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(4)], "id": range(4)})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("puzzle.data.hub._resolve", lambda name, revision: f"{revision}-{len(calls)}")
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
    assert [document.content for document in read(source, start=1)] == ["row 1", "row 2", "row 3"]
    name = source.partition(":")[0].partition("@")[0]
    expected = {"name": name, "config": config, "split": split, "revision": revision, "streaming": False}
    assert hub == [expected]


def test_dataset_is_streamed_under_a_limit_and_opened_late(
    hub: list[dict[str, Any]], read: Read, tmp_path: Path
) -> None:
    open_sources("some/data", tmp_path / "memory.json", max_tokens=100)
    assert not hub
    assert [document.place for document in read("some/data", start=2, max_tokens=100)] == [
        "some/data row 2",
        "some/data row 3",
    ]
    assert hub[0]["streaming"]


def test_dataset_stays_at_its_first_commit(hub: list[dict[str, Any]], read: Read, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    first = open_sources("some/data", memory).address
    read("some/data")  # one call later, `main` is another commit
    assert open_sources("some/data", memory).address == first
    memory.unlink()
    assert open_sources("some/data", memory).address != first


def test_dataset_errors(hub: list[dict[str, Any]], read: Read) -> None:
    refused(read, "some/data", "some/data has no column 'body'; it has id, text: name one", column="body")
    refused(read, "some/broken", "dataset some/broken cannot be loaded: Config name is missing. Please pick one")


def test_dataset_that_the_hub_does_not_give(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def dataset_info(*_: Any, **__: Any) -> Any:
        raise OSError("404:\nnot found")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    refused(
        read, "some/data", r"some/data is no file or folder here, and the hub gives no such dataset \(404: not found\)"
    )
