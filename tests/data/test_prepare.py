"""The stage as a whole: disjoint ranges, the same each time, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from puzzle.data import RANGES, TokenData, prepare_data
from puzzle.errors import PuzzleError
from puzzle.parents import Parent, open_parent
from puzzle.runs import Run

Prepare = Callable[..., TokenData]
Texts = Callable[..., list[str]]
WriteRows = Callable[[str, list[object]], Path]


def test_every_document_is_in_one_range(prepare: Prepare, texts: Texts, corpus: Path) -> None:
    data = prepare(corpus)
    expected = {json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    found = {name: {text for text in texts(data, name) if text in expected} for name in RANGES}
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert sum(data.counts[name].documents for name in RANGES) == 60
    assert len(set.union(*found.values())) >= 60 - len(RANGES)  # each range may lose its end


def test_copies_of_a_document_share_a_range(prepare: Prepare, write_rows: WriteRows) -> None:
    rows = [{"text": f"text {number % 30}, the same each time it comes"} for number in range(90)]
    data = prepare(write_rows("copies.jsonl", rows))
    assert all(data.counts[name].documents % 3 == 0 for name in RANGES)


def test_shares_of_documents(prepare: Prepare, write_rows: WriteRows) -> None:
    rows = [{"text": f"{number} sat"} for number in range(3000)]
    data = prepare(write_rows("many.jsonl", rows), calibration=0.1, validation=0.2, scoring=0.2, test=0.3)
    found = [data.counts[name].documents / 3000 for name in RANGES]
    np.testing.assert_allclose(found, [0.1, 0.2, 0.2, 0.2, 0.3], atol=0.03)  # four standard errors


def test_files_and_manifest_agree(prepare: Prepare, corpus: Path) -> None:
    data = prepare(corpus)
    manifest = json.loads((data.path / "manifest.json").read_text())["facts"]
    for name in RANGES:
        raw = np.fromfile(data.path / f"{name}.bin", "<u4").reshape(-1, 17)
        np.testing.assert_array_equal(raw, data.sequences(name, slice(None)).numpy())
        assert manifest["ranges"][name]["sequences"] == data.num_sequences(name) == len(raw) > 0
        assert manifest["ranges"][name]["tokens"] == raw.size


def test_same_bytes_in_another_run_and_another_place(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    first = prepare(corpus, run="first")
    moved = tmp_path / "elsewhere" / corpus.name
    moved.parent.mkdir()
    shutil.copy(corpus, moved)
    second = prepare(moved, run="second")
    assert first.address == second.address
    assert all(
        (first.path / f"{name}.bin").read_bytes() == (second.path / f"{name}.bin").read_bytes() for name in RANGES
    )


def test_finished_stage_is_only_opened(prepare: Prepare, corpus: Path) -> None:
    first = prepare(corpus)
    (first.path / "training.bin").rename(first.path / "training.bin.moved")
    assert prepare(corpus) == first
    assert not (first.path / "training.bin").exists()
    assert not (first.path / "pieces").exists()


def test_positions_count_from_the_first_token_of_each_document(
    prepare: Prepare, parent: Parent, write_rows: WriteRows
) -> None:
    """Also where a document holds the EOS token itself."""
    rows = [{"text": f"{n}: the cat <eos> sat on the mat" * (1 + n % 7)} for n in range(90)]
    data = prepare(write_rows("eos.jsonl", rows))
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


@pytest.mark.parametrize("change", [{"sequence_length": 8}, {"max_tokens": 1200}, {"test": 0.2}, {"column": "body"}])
def test_settings_that_matter_change_the_address(
    prepare: Prepare, write_rows: WriteRows, change: dict[str, object]
) -> None:
    rows = [{"text": f"number {n} sat on the mat, quietly", "body": f"body {n} of the cat and dog"} for n in range(60)]
    source = write_rows("two.jsonl", rows)
    assert prepare(source).address != prepare(source, **change).address


def copy_parent(parent: Parent, folder: Path) -> Path:
    return Path(shutil.copytree(parent.path, folder))


def refuse(prepare: Prepare, source: object, match: str, **settings: object) -> None:
    with pytest.raises(PuzzleError, match=match) as caught:
        prepare(source, **settings)
    assert "\n" not in str(caught.value)


def test_no_text(prepare: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refuse(prepare, tmp_path / "empty.txt", "empty.txt holds no text; its documents are all empty")
    refuse(prepare, write_rows("blank.jsonl", [{"text": " \n"}, {"text": None}]), "holds no text")


def test_range_left_empty(prepare: Prepare, corpus: Path) -> None:
    refuse(
        prepare,
        corpus,
        r"scoring gets 0 of 60 documents \(its share is 0%\).*17 tokens; raise data.scoring",
        scoring=1e-9,
    )
    refuse(prepare, corpus, "one sequence of 5001 tokens; .* lower data.sequence_length", sequence_length=5000)
    refuse(prepare, corpus, "training gets 0 of 60 .* lower the other shares", test=0.549999999)


def test_damaged_file(prepare: Prepare, corpus: Path) -> None:
    data = prepare(corpus)
    with (data.path / "test.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(PuzzleError, match=r"test.bin is not of \d+ bytes; delete the folder"):
        data.sequences("test", [0])


def test_tokenizer_without_eos(open_data_run: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path) -> None:
    path = copy_parent(parent, tmp_path / "no-eos")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PuzzleError, match="tokenizer has no EOS token"):
        prepare_data(open_data_run(str(corpus)), open_parent(str(path)))


def test_tokenizer_is_part_of_the_address(
    open_data_run: Callable[..., Run], parent: Parent, corpus: Path, tmp_path: Path
) -> None:
    path = copy_parent(parent, tmp_path / "other")
    with (path / "tokenizer.json").open("a") as file:
        file.write("\n")
    run = open_data_run(str(corpus))
    assert prepare_data(run, parent).address != prepare_data(run, open_parent(str(path))).address


def test_token_beyond_the_vocabulary(
    open_data_run: Callable[..., Run], parent: Parent, pico_checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(pico_checkpoint, tmp_path / "small"))
    for file in parent.path.glob("tokenizer*"):
        shutil.copy(file, path)
    with pytest.raises(PuzzleError, match=r"gives token \d+, its config.json has vocab_size 128"):
        prepare_data(open_data_run(str(corpus)), open_parent(str(path)))


def test_chat_without_a_template(
    open_data_run: Callable[..., Run], parent: Parent, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = copy_parent(parent, tmp_path / "plain")
    (path / "chat_template.jinja").unlink()
    source = write_rows("chat.jsonl", [{"m": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(
        PuzzleError, match=r"chat.jsonl:1 holds messages, and the parent's tokenizer has no chat template"
    ):
        prepare_data(open_data_run(str(source), column="m"), open_parent(str(path)))


def test_chat_that_the_template_refuses(
    open_data_run: Callable[..., Run], parent: Parent, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = copy_parent(parent, tmp_path / "strict")
    (path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    source = write_rows("chat.jsonl", [{"m": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(PuzzleError, match=r"chat.jsonl:1 fits no chat template: roles must alternate"):
        prepare_data(open_data_run(str(source), column="m"), open_parent(str(path)))
