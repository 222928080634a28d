"""Engines in environments of their own: without one its tests skip, or fail where PUZZLE_REQUIRE_ENGINES is set."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from puzzle.engines import python_of
from puzzle.errors import PuzzleError

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


@dataclass(frozen=True)
class Answer:
    logits_TV: Tensor
    greedy: list[int]
    text: list[int]


class LlamaCpp:
    """llama.cpp, with its KV cache in float32 and without flash attention, which rounds to float16."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder

    def __call__(
        self, models: Sequence[Path], tokens: Sequence[int], *, greedy: int = 0, text: str = ""
    ) -> list[Answer]:
        """The same request to every model, in one process."""
        requests = [
            {
                "model": str(model),
                "tokens": list(tokens),
                "logits": str(self.folder / f"{index}.npy"),
                "greedy": greedy,
                "text": text,
            }
            for index, model in enumerate(models)
        ]
        file = self.folder / "requests.json"
        file.write_text(json.dumps(requests))
        done = subprocess.run([self.python, WORKER, file], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}"
        answers = json.loads(done.stdout.splitlines()[-1])
        errors = [answer["error"] for answer in answers if "error" in answer]
        assert not errors, errors
        return [
            Answer(torch.from_numpy(np.load(request["logits"])), answer["greedy"], answer["text"])
            for request, answer in zip(requests, answers, strict=True)
        ]


@pytest.fixture
def llama_cpp(tmp_path: Path) -> LlamaCpp:
    pytest.importorskip("gguf", reason="files are written by the package gguf: pip install puzzle-llm[gguf]")
    try:
        python = python_of("llama-cpp")
    except PuzzleError as error:
        if os.environ.get("PUZZLE_REQUIRE_ENGINES"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    folder = tmp_path / "answers"
    folder.mkdir()
    return LlamaCpp(python, folder)
