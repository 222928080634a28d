"""The engine `llama.cpp`: its library on this machine's processor, at the deployed batch, with flash attention.

A stack is a GGUF file of random weights: with zeros, decode steps in float16 take a quarter less (docs/numbers.md).
Every sequence has a cache of its own, in the scenario's dtype, as in llama.cpp's server.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Sample, processor_name
from puzzle.costs.torch_engine import DECODE_STEPS, WARM_UP_STEPS
from puzzle.costs.worker import Worker
from puzzle.engines import ENVIRONMENTS, python_of, version_of
from puzzle.export import GGUFType, write_random
from puzzle.modeling import PuzzleConfig
from puzzle.parents import open_parent
from puzzle.variants import Architecture, BlockVariant

_TYPES: Mapping[str, tuple[GGUFType, int]] = {"float32": ("f32", 0), "float16": ("f16", 1), "bfloat16": ("bf16", 30)}
"""By the scenario's dtype: the type of the file's matrices, and the same as ggml numbers it, for the cache."""
_WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class LlamaCppEngine:
    """Stacks of blocks in llama.cpp; one worker process for all measurements."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario
        self._worker: Worker | None = None
        self._folder = Path()

    @cached_property
    def environment(self) -> Mapping[str, str]:
        return {
            "engine": f"llama.cpp (llama-cpp-python {version_of(python_of(*ENVIRONMENTS['llama.cpp']), 'llama_cpp')})",
            "device": processor_name(),
            "threads": str(torch.get_num_threads()),
        }

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """One worker process, and a folder for its files, for all measurements inside."""
        with tempfile.TemporaryDirectory(prefix="puzzle-llama-cpp-") as folder:
            self._folder = Path(folder)
            self._worker = Worker("llama.cpp", python_of(*ENVIRONMENTS["llama.cpp"]), _WORKER, torch.get_num_threads())
            try:
                yield
            finally:
                self._worker.close()
                self._worker = None

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        """Time these blocks once, after an uncounted micro-batch."""
        return self._time(Architecture(tuple(blocks)).configure(self._config), batch_size)

    def measure_checkpoint(self, checkpoint: Path, batch_size: int) -> Sample:
        """Time a model of a checkpoint's shapes once."""
        return self._time(open_parent(str(checkpoint)).config, batch_size)

    def _time(self, config: PuzzleConfig, batch_size: int) -> Sample:
        assert self._worker is not None, "measure inside `conditions`"
        scenario = self._scenario
        file_type, cache_type = _TYPES[scenario.dtype]
        answer = self._worker.ask(
            {
                "model": str(write_random(config, self._folder / "model.gguf", dtype=file_type)),
                "cache_type": cache_type,
                "threads": torch.get_num_threads(),
                "batch_size": batch_size,
                "prompt_tokens": scenario.prompt_tokens,
                "generated_tokens": scenario.generated_tokens,
                "warm_up_steps": WARM_UP_STEPS,
                "steps": DECODE_STEPS,
            }
        )
        return Sample(**answer)
