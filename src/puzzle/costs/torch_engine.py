"""The engine `torch`: the model as transformers' `generate` runs it, eager, with a cache that grows by concatenation.

A forward frees tensors of many megabytes. By default glibc gives these back to the kernel at once, and the next tensor
pays for every page again (docs/numbers.md). Servers preload an allocator that keeps memory; here glibc is told to.

Shapes: B batch, T tokens.
"""

import ctypes
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from transformers import DynamicCache

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample, shapes_of
from puzzle.device import device_name, is_gpu, times_ms
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish

WARM_UP_STEPS = 4
"""The first steps after a prefill are slower, until the heap has room for the growing cache."""
DECODE_STEPS = 16
_ALIGNMENT = 64
"""Elements; torch's own allocations start at cache lines, and so shall the pool's parts."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # from malloc.h
MEMORY_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""Environment variables that let glibc keep freed memory in a process that is to be started."""


def keeps_memory(device: torch.device) -> bool:
    """Whether glibc must be told to: on a GPU, torch's own allocator keeps what is freed."""
    return not is_gpu(device) and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


class TorchEngine(Engine):
    """Shapes, those of a checkpoint too, with random weights: they do not change the time."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._dtype: torch.dtype = getattr(torch, scenario.dtype)
        self._pool = torch.empty(0, dtype=self._dtype, device=self.device)
        self._warm: set[tuple[str, int]] = set()

    @property
    def version(self) -> str:
        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Let the process keep what it frees until the end of the block."""
        if not keeps_memory(self.device):
            yield
            return
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        try:
            yield
        finally:
            # Once set, the thresholds do not move by themselves; these are where they end up with large tensors.
            for option, value in ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 64 * 2**20), (_MMAP_THRESHOLD, 32 * 2**20)):
                libc.mallopt(option, value)
            libc.malloc_trim(ctypes.c_size_t(0))

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model; an uncounted run before the first starts threads and heap (on a GPU: for each shape)."""
        runnable, measured = self.build(shapes_of(model)), []
        shape = str(runnable.config.blocks) if is_gpu(self.device) else ""
        for batch_size in batch_sizes:
            if (shape, batch_size) not in self._warm:
                time_model(runnable, self.scenario, batch_size)
                self._warm.add((shape, batch_size))
            measured.append([time_model(runnable, self.scenario, batch_size) for _ in range(rounds)])
        return measured

    def build(self, config: PuzzleConfig) -> PuzzleForCausalLM:
        """A model with random weights out of a pool, so that the next one costs neither memory nor time."""
        model = empty_model(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        sizes = [-(-shape.numel() // _ALIGNMENT) * _ALIGNMENT for shape in shapes.values()]
        if sum(sizes) > len(self._pool):
            self._pool = torch.empty(sum(sizes), dtype=self._dtype, device=self.device).normal_(std=0.02)
        parts = zip(shapes.items(), self._pool[: sum(sizes)].split(sizes), strict=True)
        state = {name: part[: shape.numel()].view(shape) for (name, shape), part in parts}
        model.load_state_dict(state, strict=False, assign=True)
        return finish(model, self.device)


@torch.no_grad()
def time_model(model: PuzzleForCausalLM, scenario: Scenario, batch_size: int) -> Sample:
    """One prefill, then decode steps around the middle of the answer; a `PuzzleError` if memory does not suffice."""
    cache, device = DynamicCache(config=model.config), model.device
    count = batch_size * scenario.prompt_tokens
    tokens_BT = (torch.arange(count, device=device) % model.config.vocab_size).view(batch_size, -1)

    def step() -> None:
        """Let the model read `tokens_BT`, and put the next token of every sequence into its place."""
        nonlocal tokens_BT
        tokens_BT = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    try:
        (prefill_ms,) = times_ms(device, step, 1)
        # As if more tokens had been read: copies of the last one, as only the cache's length sets the time. Layers with
        # a window drop by themselves what is too old.
        skipped = max(0, (scenario.generated_tokens - DECODE_STEPS) // 2 - WARM_UP_STEPS)
        for layer in cache.layers:
            layer.update(*(past[:, :, -1:].expand(-1, -1, skipped, -1) for past in (layer.keys, layer.values)))
        # On a GPU launches set this time, as nothing is captured: a graph over a static cache would be replayed here.
        steps_ms = times_ms(device, step, WARM_UP_STEPS + DECODE_STEPS)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PuzzleError(
            f"scenario.batch_sizes: {batch_size} x {scenario.total_tokens} tokens do not fit into the memory of "
            f"{device_name(device)}; use smaller batch sizes or shorter texts"
        ) from None
    return Sample(prefill_ms, statistics.median(steps_ms[WARM_UP_STEPS:]))
