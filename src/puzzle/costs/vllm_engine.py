"""The engine `vllm`: the unmodified server's engine, in an environment of its own, at the deployed batch.

A stack is a checkpoint without weights: vLLM's Transformers backend runs the model's own code and fills it with dummy
numbers. Every measurement starts the engine anew, which takes seconds and is not counted.
"""

import math
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.allocator import KEPT, KEPT_FROM_START, keeps_memory
from puzzle.costs.engine import Sample
from puzzle.costs.worker import Worker
from puzzle.engines import ENVIRONMENTS, python_of, version_of
from puzzle.modeling import PuzzleConfig, save_configuration
from puzzle.variants import Architecture, BlockVariant

_ROUNDS = 5
_CACHE_GIB = 1
"""Beside what a full batch takes: vLLM allots its cache in blocks of equal size over layers that differ."""
_WORKER = Path(__file__).with_name("vllm_worker.py")


class VLLMEngine:
    """Stacks of blocks in vLLM; one worker process for all measurements."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario
        self._worker: Worker | None = None

    @cached_property
    def environment(self) -> Mapping[str, str]:
        version = version_of(python_of(*ENVIRONMENTS["vllm"]), "vllm")
        return {
            "engine": f"vllm {version}, Transformers backend",
            "device": self._scenario.device,
            "threads": str(torch.get_num_threads()),
            "allocator": KEPT if self._keeps_memory else "as it comes",
        }

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """One worker process for all measurements inside."""
        variables = KEPT_FROM_START if self._keeps_memory else {}
        self._worker = Worker("vllm", python_of(*ENVIRONMENTS["vllm"]), _WORKER, torch.get_num_threads(), variables)
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
            return self._time(folder, batch_size, load_format="dummy", model_impl="transformers")
        finally:
            shutil.rmtree(folder)

    def measure_checkpoint(self, checkpoint: Path, batch_size: int) -> Sample:
        """Time any checkpoint that vLLM loads, in the code it chooses itself: a parent's may be of its own."""
        return self._time(checkpoint, batch_size, load_format="auto", model_impl="auto")

    def _time(self, checkpoint: Path, batch_size: int, **how: str) -> Sample:
        scenario = self._scenario
        assert self._worker is not None, "measure inside `conditions`"
        answer = self._worker.ask(
            {
                "checkpoint": str(checkpoint),
                **how,
                "dtype": scenario.dtype,
                "batch_size": batch_size,
                "prompt_tokens": scenario.prompt_tokens,
                "generated_tokens": scenario.generated_tokens,
                "rounds": _ROUNDS,
                "cache_gib": _CACHE_GIB + math.ceil(self._cache_bytes(batch_size) / 2**30),
            }
        )
        return Sample(
            prefill_ms=statistics.median(answer["prefill_ms"]), decode_ms=statistics.median(answer["decode_ms"])
        )

    @property
    def _keeps_memory(self) -> bool:
        """Servers preload an allocator that does: vLLM itself one that it brings, or it warns that there is none."""
        return keeps_memory(torch.device(self._scenario.device))

    def _cache_bytes(self, batch_size: int) -> int:
        """What a full batch of the parent would take; no child takes more."""
        dtype: torch.dtype = getattr(torch, self._scenario.dtype)
        tokens, config = batch_size * self._scenario.total_tokens, self._config
        values = sum(block.attention.kv_values(config, tokens) for block in Architecture.of(config).blocks)
        return values * dtype.itemsize
