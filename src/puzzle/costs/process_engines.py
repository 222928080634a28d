"""The engines `llama.cpp` and `vllm`: unmodified, at the deployed batch, in Python environments of their own.

One process of `worker.py` answers all requests of a comparison, a line of JSON each way.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample, shapes_of
from puzzle.costs.torch_engine import DECODE_STEPS, MEMORY_KEPT, WARM_UP_STEPS, keeps_memory
from puzzle.device import free_share, release_memory
from puzzle.engines.environments import python_of, version_of
from puzzle.errors import PuzzleError, one_line
from puzzle.export import GGUFType, write_random
from puzzle.modeling import PuzzleConfig, save_configuration
from puzzle.variants import Architecture

_WORKER = Path(__file__).with_name("worker.py")
_TYPES: Mapping[str, tuple[GGUFType, int]] = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}
"""By the scenario's dtype: the type of a GGUF file's matrices, and the same as ggml numbers it, for the cache."""
_CACHE_GIB = 1
"""Beside what a full batch takes: vLLM allots its cache in blocks of equal size over layers that differ."""


class ProcessEngine(Engine):
    """An engine in the process of `worker.py`."""

    title: ClassVar[str]
    """With a place for its version."""
    variables: Mapping[str, str] = {}
    """Added to the process's environment."""
    _process: Any
    """A `Popen` with pipes."""

    @property
    def version(self) -> str:
        return self.title.format(version_of(self.scenario.engine))

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Keep the process until the end of the block."""
        self._process = subprocess.Popen(
            [str(python_of(self.scenario.engine)), "-P", str(_WORKER), self.scenario.engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **self.variables},
        )
        try:
            yield
        finally:
            self._process.communicate()

    def _ask(self, model: Path, batch_sizes: Sequence[int], rounds: int, **options: Any) -> list[list[Sample]]:
        """For each batch size a sample a round; a `PuzzleError` if the engine refuses, or dies of the request."""
        request = {"model": str(model), "batch_sizes": list(batch_sizes), "rounds": rounds, **options}
        request |= {**asdict(self.scenario), "threads": torch.get_num_threads()}
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            ended = f"{self.scenario.engine}'s process ended with {self._process.wait()}"
            raise PuzzleError(f"scenario.engine: {ended}; run it by hand to see why")
        answer = json.loads(line)
        if "error" in answer:
            reason = one_line(answer["error"])
            raise PuzzleError(f"scenario.engine: {self.scenario.engine} cannot run this ({reason})")
        return [[Sample(*pair) for pair in pairs] for pairs in answer["samples"]]


class LlamaCppEngine(ProcessEngine):
    """llama.cpp's library on this machine's processor, with flash attention, and a cache for each sequence.

    A model, a checkpoint too, is a GGUF file of its shapes with random weights: with zeros, decode steps in float16
    take a quarter less (docs/numbers.md). The cache is in the scenario's dtype.
    """

    title, beyond_window = "llama.cpp (llama-cpp-python {})", 513  # the next token, and a micro-batch of its server

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model, each round after an uncounted micro-batch."""
        file_type, cache_type = _TYPES[self.scenario.dtype]
        with tempfile.TemporaryDirectory(prefix="puzzle-llama-cpp-") as folder:
            file = write_random(shapes_of(model), Path(folder) / "model.gguf", dtype=file_type)
            options = {"cache_type": cache_type, "warm_up_steps": WARM_UP_STEPS, "steps": DECODE_STEPS}
            return self._ask(file, batch_sizes, rounds, **options)


def check_llama_cpp() -> None:
    """Decode with a tiny file of q8_0; a `PuzzleError` if llama.cpp dies of it, as it may where f16 files run."""
    scenario = Scenario(engine="llama.cpp", device="cpu", dtype="float16", prompt_tokens=8, generated_tokens=8)
    engine, sizes = LlamaCppEngine(scenario), {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    config = PuzzleConfig(vocab_size=256, num_hidden_layers=2, **sizes)
    with tempfile.TemporaryDirectory() as folder, engine.conditions():
        file = write_random(config, Path(folder) / "tiny.gguf", dtype="q8_0")
        engine._ask(file, [1], 1, cache_type=1, warm_up_steps=1, steps=1)


class VLLMEngine(ProcessEngine):
    """vLLM, in which every model has an engine of its own, for all batch sizes and rounds; its start is not counted.

    Shapes are a checkpoint without weights: the Transformers backend runs the model's own code with dummy numbers.
    """

    slow_start, title = True, "vllm {}, Transformers backend"
    beyond_window = 8192  # of the prompt, in one step of its scheduler

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        # Servers preload an allocator that keeps memory, as vLLM does where it brings one.
        self.variables = MEMORY_KEPT if keeps_memory(self.device) else {}

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a checkpoint in the code that vLLM chooses, which for a parent may be its own, or shapes in ours."""
        config = shapes_of(model)
        dtype, tokens = getattr(torch, self.scenario.dtype), max(batch_sizes) * self.scenario.total_tokens
        variants = (variant for block in Architecture.of(config).blocks for variant in block.subblocks)
        cache_bytes = sum(variant.kv_bytes(config, tokens, dtype) for variant in variants)
        cache_gib = _CACHE_GIB + math.ceil(cache_bytes / 2**30)
        release_memory()
        settings: dict[str, Any] = {"dtype": self.scenario.dtype}
        settings["gpu_memory_utilization"] = self.scenario.gpu_memory * free_share(self.device)
        if self.scenario.tensor_parallel > 1:
            settings["tensor_parallel_size"] = self.scenario.tensor_parallel
        with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
            if isinstance(model, PuzzleConfig):
                save_configuration(model, Path(folder))
                model, settings = Path(folder), settings | {"load_format": "dummy", "model_impl": "transformers"}
            return self._ask(model, batch_sizes, rounds, cache_gib=cache_gib, settings=settings)
