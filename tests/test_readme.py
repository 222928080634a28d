"""The README's Python example runs as it stands."""

import re
from pathlib import Path

import pytest

from puzzle.recipe import Recipe

README = Path(__file__).parent.parent / "README.md"


def test_python_example(
    tmp_path: Path, pico_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 12
    (tmp_path / "my.yaml").write_text(pico_recipe.to_yaml())
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "ScoreRow(layer=0" in shown
    assert "proven optimal" in shown
    assert float(shown.split()[-1]) > 0


def test_file_tree_names_what_is_there() -> None:
    tree = re.findall(r"^    ([a-z_]+(?:\.py|/)) ", README.read_text(), re.MULTILINE)
    source = README.parent / "src" / "puzzle"
    there = {path.name for path in source.iterdir() if not path.name.startswith("__")}
    assert {name.rstrip("/") for name in tree} == there
