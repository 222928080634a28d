"""Recipes, data sheets and tables are read alike, whatever saved them, and no key in them is given twice."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.search.test_table_file import EXAMPLES
from tests.test_recipe import MINIMAL

from puzzle.costs import read_machine
from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe
from puzzle.search import read_table

SHEET = {"mine": {"peak_tflops": {"float32": 1.0}, "memory_gb_s": 1.0, "memory_gb": 1.0}}
READERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "recipe": (Recipe.read, yaml.safe_dump(MINIMAL), "parent: other\n"),
    "sheet": (lambda path: read_machine(str(path)), yaml.safe_dump(SHEET), "mine: {}\n"),
    "table": (read_table, EXAMPLES[0], '"parent": "other",'),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, name: str, encoding: str) -> None:
    reader, text, _ = READERS[name]
    plain, file = tmp_path / "plain", tmp_path / "file"
    plain.write_text(text)
    file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert repr(reader(file)) == repr(reader(plain))
    file.write_bytes(text.encode("utf-16-le"))  # without a mark
    with pytest.raises(PuzzleError, match="it holds NULs, as UTF-16 does; save it as UTF-8"):
        reader(file)
    file.write_bytes(b"# caf\xe9\n" + text.encode())
    with pytest.raises(PuzzleError, match="can't decode byte 0xe9"):
        reader(file)


@pytest.mark.parametrize("name", READERS)
def test_a_key_that_is_given_twice(tmp_path: Path, name: str) -> None:
    reader, text, more = READERS[name]
    (tmp_path / "file").write_text("{" + more + text.lstrip("{") if name == "table" else text + more)
    with pytest.raises(PuzzleError, match=re.escape(more.split(":")[0].strip('"') + " is given twice")):
        reader(tmp_path / "file")


@pytest.mark.parametrize("name", READERS)
def test_pipes(tmp_path: Path, name: str) -> None:
    reader, text, _ = READERS[name]
    (tmp_path / "plain").write_text(text)
    end, begin = os.pipe()
    os.write(begin, text.encode())
    os.close(begin)
    assert repr(reader(Path(f"/dev/fd/{end}"))) == repr(reader(tmp_path / "plain"))
    os.close(end)
