"""The engine `llama.cpp`: its library on this machine's processor, at the deployed batch, with flash attention.

A model is a GGUF file of random weights: with zeros, decode steps in float16 take a quarter less (docs/numbers.md).
Every sequence has a cache of its own, in the scenario's dtype, as in llama.cpp's server.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Model, Sample
from puzzle.costs.torch_engine import DECODE_STEPS, WARM_UP_STEPS
from puzzle.costs.worker import Worker
from puzzle.device import device_name
from puzzle.engines.environments import ENVIRONMENTS, python_of, version_of
from puzzle.export import GGUFType, write_random
from puzzle.modeling import PuzzleConfig
from puzzle.parents import open_parent

_TYPES: Mapping[str, tuple[GGUFType, int]] = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}
"""By the scenario's dtype: the type of the file's matrices, and the same as ggml numbers it, for the cache."""


class LlamaCppEngine:
    """One worker process for all measurements; a checkpoint is timed by its shapes."""

    slow_start: ClassVar[bool] = False

    def __init__(self, scenario: Scenario) -> None:
        self._dtype, self._worker = scenario.dtype, Worker("time_llama_cpp.py", scenario)

    @cached_property
    def environment(self) -> Mapping[str, str]:
        return {
            "engine": f"llama.cpp (llama-cpp-python {version_of(python_of(*ENVIRONMENTS['llama.cpp']), 'llama_cpp')})",
            "device": device_name(torch.device("cpu")),
            "threads": str(torch.get_num_threads()),
        }

    def conditions(self) -> AbstractContextManager[None]:
        return self._worker.running({})

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model, each round after an uncounted micro-batch."""
        config = model if isinstance(model, PuzzleConfig) else open_parent(str(model)).config
        file_type, cache_type = _TYPES[self._dtype]
        with tempfile.TemporaryDirectory(prefix="puzzle-llama-cpp-") as folder:
            file = write_random(config, Path(folder) / "model.gguf", dtype=file_type)
            options = {"cache_type": cache_type, "warm_up_steps": WARM_UP_STEPS, "steps": DECODE_STEPS}
            return self._worker.measure(file, batch_sizes, rounds, **options)
