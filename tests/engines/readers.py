"""What reads an exported child, and how to ask it: logits of a text, and a greedy answer."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engines.parity import greedy as greedy_of
from tests.engines.parity import logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.engines.environments import python_of
from puzzle.errors import PuzzleError


@dataclass(frozen=True)
class Answer:
    logits_TV: Tensor
    """vLLM: log-probabilities, of all tokens but the last."""
    greedy: list[int]
    text: list[int]


Ask = Callable[..., list[Answer]]
"""The same request to every model, in one process: `ask(models, tokens, greedy=0, text="")`."""


def transformers(models: Sequence[Path], tokens: Sequence[int], greedy: int = 0) -> list[Answer]:
    """With the code in the checkpoint."""
    loaded = (AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True) for model in models)
    return [Answer(logits_of(model, list(tokens)), greedy_of(model, list(tokens), greedy), []) for model in loaded]


def llama_cpp(models: Sequence[Path], tokens: Sequence[int], greedy: int = 0, text: str = "") -> list[Answer]:
    """With its KV cache in float32 and without flash attention, which rounds to float16."""
    return _ask("llama_cpp", python_of("llama.cpp"), models, tokens, greedy, text)


def vllm(models: Sequence[Path], tokens: Sequence[int], greedy: int = 0) -> list[Answer]:
    """In float32."""
    return _ask("vllm", python_of("vllm"), models, tokens, greedy, "")


def required(find: Callable[[], Path]) -> Path:
    """An engine's program: without it the test skips, or fails where PUZZLE_REQUIRE_ENGINES is set."""
    try:
        return find()
    except PuzzleError as error:
        (pytest.fail if os.environ.get("PUZZLE_REQUIRE_ENGINES") else pytest.skip)(str(error))


def _ask(
    engine: str, python: Path, models: Sequence[Path], tokens: Sequence[int], greedy: int, text: str
) -> list[Answer]:
    with tempfile.TemporaryDirectory() as folder:
        request = {"tokens": list(tokens), "greedy": greedy, "text": text}
        requests = [
            request | {"model": str(model), "logits": f"{folder}/{index}.npy"} for index, model in enumerate(models)
        ]
        asked, answered = Path(folder, "requests"), Path(folder, "answers")
        asked.write_text(json.dumps(requests))
        command = [python, Path(__file__).with_name("worker.py"), engine, asked, answered]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{engine} ended with {done.returncode}: {done.stderr[-2000:]}"
        answers = json.loads(answered.read_text())
        errors = [f"{model}: {each['error']}" for model, each in zip(models, answers, strict=True) if "error" in each]
        assert not errors, errors
        return [
            Answer(torch.from_numpy(np.load(request["logits"])), each["greedy"], each["text"])
            for request, each in zip(requests, answers, strict=True)
        ]
