"""What reads an exported child, and how to ask it: logits of a text, and a greedy answer."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tests.engines.parity import greedy as greedy_of
from tests.engines.parity import logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    logits_TV: Tensor
    """vLLM: log-probabilities, of all tokens but the last."""
    greedy: list[int]
    text: list[int]


class Transformers:
    """transformers, with the code in the checkpoint."""

    def __call__(self, models: Sequence[Path], tokens: Sequence[int], *, greedy: int = 0) -> list[Answer]:
        loaded = (AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True) for model in models)
        prompt = list(tokens)
        return [Answer(logits_of(model, prompt), greedy_of(model, prompt, greedy), []) for model in loaded]


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp, with its KV cache in float32 and without flash attention, which rounds to float16."""

    python: Path
    folder: Path

    def __call__(
        self, models: Sequence[Path], tokens: Sequence[int], *, greedy: int = 0, text: str = ""
    ) -> list[Answer]:
        """The same request to every model, in one process."""
        return _ask(self.python, "llama_cpp_worker.py", self.folder, models, tokens, greedy, text)


@dataclass(frozen=True)
class Vllm:
    """vLLM in float32."""

    python: Path
    folder: Path

    def __call__(self, models: Sequence[Path], tokens: Sequence[int], *, greedy: int = 0) -> list[Answer]:
        """The same request to every model, in one process."""
        return _ask(self.python, "vllm_worker.py", self.folder, models, tokens, greedy, "")


def _ask(
    python: Path, worker: str, folder: Path, models: Sequence[Path], tokens: Sequence[int], greedy: int, text: str
) -> list[Answer]:
    requests = [
        {
            "model": str(model),
            "tokens": list(tokens),
            "logits": str(folder / f"{index}.npy"),
            "greedy": greedy,
            "text": text,
        }
        for index, model in enumerate(models)
    ]
    asked, answered = folder / "requests.json", folder / "answers.json"
    asked.write_text(json.dumps(requests))
    done = subprocess.run([python, _HERE / worker, asked, answered], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{worker} ended with {done.returncode}: {done.stderr[-2000:]}"
    answers = json.loads(answered.read_text())
    errors = [f"{model}: {answer['error']}" for model, answer in zip(models, answers, strict=True) if "error" in answer]
    assert not errors, errors
    return [
        Answer(torch.from_numpy(np.load(request["logits"])), answer["greedy"], answer.get("text", []))
        for request, answer in zip(requests, answers, strict=True)
    ]
