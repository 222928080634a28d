"""The engines `llama.cpp` and `vllm`: unmodified, at the deployed batch, in Python environments of their own.

One worker process answers all requests of a comparison, a line of JSON each way.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample, machine, shapes_of
from puzzle.costs.torch_engine import DECODE_STEPS, MEMORY_KEPT, WARM_UP_STEPS, allocator_name, keeps_memory
from puzzle.device import free_share, release_memory
from puzzle.engines.environments import ENVIRONMENTS, python_of, version_of
from puzzle.errors import PuzzleError, one_line
from puzzle.export import GGUFType, write_random
from puzzle.modeling import save_configuration
from puzzle.variants import Architecture

_WORKERS = Path(__file__).parent / "workers"
_TYPES: Mapping[str, tuple[GGUFType, int]] = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}
"""By the scenario's dtype: the type of a GGUF file's matrices, and the same as ggml numbers it, for the cache."""
_CACHE_GIB = 1
"""Beside what a full batch takes: vLLM allots its cache in blocks of equal size over layers that differ."""
_MEMORY_SHARE = 0.9
"""vLLM's own default; here of what is free once this process has released what it no longer uses."""


class ProcessEngine(Engine):
    """An engine whose process runs `workers/serve.py`, with a script of its own."""

    script: ClassVar[str]
    module: ClassVar[str]
    """Of the engine's package."""
    variables: Mapping[str, str] = {}
    """Added to the process's environment."""

    @property
    def version(self) -> str:
        return version_of(python_of(*ENVIRONMENTS[self.scenario.engine]), self.module)

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Keep the process until the end of the block."""
        python = python_of(*ENVIRONMENTS[self.scenario.engine])
        reader, writer = os.pipe()  # engines print what they like to standard output
        self._process = subprocess.Popen(
            [str(python), str(_WORKERS / "serve.py"), self.script, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            pass_fds=(writer,),
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | dict(self.variables),
        )
        os.close(writer)
        assert self._process.stdin is not None
        self._requests: IO[str] = self._process.stdin
        with os.fdopen(reader, encoding="utf-8") as self._answers:
            try:
                yield
            finally:
                with suppress(BrokenPipeError):
                    self._requests.close()
                self._process.wait()

    def _ask(self, model: Path, batch_sizes: Sequence[int], rounds: int, **options: Any) -> list[list[Sample]]:
        """For each batch size a sample a round; a `PuzzleError` if the engine refuses, or dies of the request.

        Args:
            options: what the script needs to know besides.
        """
        request = {
            "model": str(model),
            "batch_sizes": list(batch_sizes),
            "rounds": rounds,
            "prompt_tokens": self.scenario.prompt_tokens,
            "generated_tokens": self.scenario.generated_tokens,
            "threads": torch.get_num_threads(),
            **options,
        }
        with suppress(BrokenPipeError):  # then there is no answer either
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        line, engine = self._answers.readline(), self.scenario.engine
        if not line:
            code = self._process.wait()
            raise PuzzleError(f"scenario.engine: {engine}'s process ended with {code}; run it by hand to see why")
        answer = json.loads(line)
        if "error" in answer:
            raise PuzzleError(f"scenario.engine: {engine} cannot run this ({one_line(answer['error'])})")
        return [[Sample(prefill_ms=pair[0], decode_ms=pair[1]) for pair in pairs] for pairs in answer["samples"]]


class LlamaCppEngine(ProcessEngine):
    """llama.cpp's library on this machine's processor, with flash attention, and a cache for each sequence.

    A model, a checkpoint too, is a GGUF file of its shapes with random weights: with zeros, decode steps in float16
    take a quarter less (docs/numbers.md). The cache is in the scenario's dtype.
    """

    script, module = "time_llama_cpp.py", "llama_cpp"

    @cached_property
    def environment(self) -> Mapping[str, str]:
        return {"engine": f"llama.cpp (llama-cpp-python {self.version})", **machine(torch.device("cpu"))}

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model, each round after an uncounted micro-batch."""
        file_type, cache_type = _TYPES[self.scenario.dtype]
        with tempfile.TemporaryDirectory(prefix="puzzle-llama-cpp-") as folder:
            file = write_random(shapes_of(model), Path(folder) / "model.gguf", dtype=file_type)
            options = {"cache_type": cache_type, "warm_up_steps": WARM_UP_STEPS, "steps": DECODE_STEPS}
            return self._ask(file, batch_sizes, rounds, **options)


class VLLMEngine(ProcessEngine):
    """vLLM, in which every model has an engine of its own, for all batch sizes and rounds; its start is not counted.

    Shapes are a checkpoint without weights: the Transformers backend runs the model's own code with dummy numbers.
    """

    slow_start, script, module = True, "time_vllm.py", "vllm"

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._device = torch.device(scenario.device)
        # Servers preload an allocator that keeps memory, as vLLM does where it brings one.
        self.variables = MEMORY_KEPT if keeps_memory(self._device) else {}

    @cached_property
    def environment(self) -> Mapping[str, str]:
        engine = f"vllm {self.version}, Transformers backend"
        return {"engine": engine, **machine(self._device), "allocator": allocator_name(self._device)}

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a checkpoint in the code that vLLM chooses, which for a parent may be its own, or shapes in ours."""
        config = shapes_of(model)
        dtype, tokens = getattr(torch, self.scenario.dtype), max(batch_sizes) * self.scenario.total_tokens
        variants = (variant for block in Architecture.of(config).blocks for variant in block.subblocks)
        cache_bytes = sum(variant.kv_bytes(config, tokens, dtype) for variant in variants)
        release_memory()
        settings = {"dtype": self.scenario.dtype, "gpu_memory_utilization": _MEMORY_SHARE * free_share(self._device)}
        cache_gib = _CACHE_GIB + math.ceil(cache_bytes / 2**30)
        if isinstance(model, Path):
            return self._ask(model, batch_sizes, rounds, cache_gib=cache_gib, settings=settings)
        settings |= {"load_format": "dummy", "model_impl": "transformers"}
        with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
            save_configuration(model, Path(folder))
            return self._ask(Path(folder), batch_sizes, rounds, cache_gib=cache_gib, settings=settings)
