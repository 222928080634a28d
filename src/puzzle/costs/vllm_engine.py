"""The engine `vllm`: the unmodified server's engine, in an environment of its own, at the deployed batch.

Shapes are a checkpoint without weights: vLLM's Transformers backend runs the model's own code and fills it with dummy
numbers. Starting the engine takes seconds to minutes: once for all batch sizes and rounds of a model, and not counted.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.allocator import KEPT_FROM_START, allocator_name, keeps_memory
from puzzle.costs.engine import Model, Sample
from puzzle.costs.worker import Worker
from puzzle.device import free_share, release_memory
from puzzle.engines.environments import ENVIRONMENTS, python_of, version_of
from puzzle.modeling import PuzzleConfig, save_configuration
from puzzle.parents import open_parent
from puzzle.variants import Architecture

_CACHE_GIB = 1
"""Beside what a full batch takes: vLLM allots its cache in blocks of equal size over layers that differ."""
_MEMORY_SHARE = 0.9
"""vLLM's own default; here of what is free once this process has released what it no longer uses."""


class VLLMEngine:
    """One worker process for all measurements, in which every model has an engine of its own."""

    slow_start: ClassVar[bool] = True

    def __init__(self, scenario: Scenario) -> None:
        self._scenario, self._device = scenario, torch.device(scenario.device)
        self._worker = Worker("time_vllm.py", scenario)

    @cached_property
    def environment(self) -> Mapping[str, str]:
        version = version_of(python_of(*ENVIRONMENTS["vllm"]), "vllm")
        return {
            "engine": f"vllm {version}, Transformers backend",
            "device": self._scenario.device,
            "threads": str(torch.get_num_threads()),
            "allocator": allocator_name(self._device),
        }

    def conditions(self) -> AbstractContextManager[None]:
        """The worker process; servers preload an allocator that keeps memory, as vLLM does where it brings one."""
        return self._worker.running(KEPT_FROM_START if keeps_memory(self._device) else {})

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a checkpoint in the code that vLLM chooses, which for a parent may be its own, or shapes in ours."""
        config = model if isinstance(model, PuzzleConfig) else open_parent(str(model)).config
        dtype, tokens = getattr(torch, self._scenario.dtype), max(batch_sizes) * self._scenario.total_tokens
        variants = (variant for block in Architecture.of(config).blocks for variant in block.subblocks)
        cache_bytes = sum(variant.kv_bytes(config, tokens, dtype) for variant in variants)
        release_memory()
        options = {
            "dtype": self._scenario.dtype,
            "cache_gib": _CACHE_GIB + math.ceil(cache_bytes / 2**30),
            "memory_share": _MEMORY_SHARE * free_share(self._device),
        }
        if isinstance(model, Path):
            return self._worker.measure(model, batch_sizes, rounds, load_format="auto", model_impl="auto", **options)
        with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
            save_configuration(model, Path(folder))
            options |= {"load_format": "dummy", "model_impl": "transformers"}
            return self._worker.measure(Path(folder), batch_sizes, rounds, **options)
