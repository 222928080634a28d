"""What `import puzzle` gives, and what it makes known to transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import pico_puzzle

import puzzle


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there() -> None:
    names = [name for name in dir(puzzle) if name not in vars(puzzle)]
    assert {"Pipeline", "Recipe", "open_run", "realise", "solve"} <= {*names}
    assert all(callable(getattr(puzzle, name)) for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'Pipline'"):
        puzzle.Pipline  # noqa: B018


@pytest.mark.parametrize("imports", ["import puzzle, transformers", "import transformers, puzzle"])
def test_transformers_loads_a_child_without_the_flag(tmp_path: Path, imports: str) -> None:
    pico_puzzle("kv2+w16", "none+w48").save_pretrained(tmp_path)
    code = f"import sys\n{imports}\n"
    code += "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    assert python(code, str(tmp_path)) == "PuzzleForCausalLM\n"


def test_importing_puzzle_imports_no_model_code() -> None:
    code = "import sys, importlib.util, puzzle\nimportlib.util.find_spec('transformers')\nprint('torch' in sys.modules)"
    assert python(code) == "False\n"


def test_a_task_of_the_users_own_finds_puzzle_inside_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from puzzle import Parent\n\ndef accuracy(model):\n    return 1.0\n")
    code = "import sys\nsys.argv = [sys.argv[1], 'score']\nimport puzzle.cli\n"
    code += "from puzzle.scores.task import load_task\nprint(load_task('mine:accuracy')(None))"
    assert python(code, str(Path(sys.executable).parent / "puzzle"), cwd=tmp_path) == "1.0\n"
