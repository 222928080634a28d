"""Engines in environments of their own."""

import pytest
from tests.engines import readers

from puzzle.engines.environments import python_of


@pytest.fixture
def llama_cpp() -> readers.Ask:
    readers.required(lambda: python_of("llama.cpp"))
    return readers.llama_cpp


@pytest.fixture
def vllm() -> readers.Ask:
    readers.required(lambda: python_of("vllm"))
    return readers.vllm
