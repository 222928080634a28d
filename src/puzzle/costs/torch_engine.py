"""The engine `torch`: the model's own modules with SDPA, prefill and decode apart.

On a CPU a step is as transformers' `generate` runs it: eager, with a cache that grows by concatenation. On a GPU that
would time Python's launches and not the model, so that a step is a replayed CUDA graph, at the middle context length.

A forward frees tensors of many megabytes. By default glibc gives these back to the kernel at once, and the next tensor
pays for every page again (docs/numbers.md). Servers preload an allocator that keeps memory; here glibc is told to.

Shapes: B batch, T tokens.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from puzzle.artefacts import Scenario
from puzzle.costs.engine import Engine, Model, Sample, shapes_of
from puzzle.device import device_name, is_gpu, release_memory, replays_ms, times_ms
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer, PuzzleForCausalLM, empty_model, finish

WARM_UP_STEPS = 4
"""The first steps after a prefill are slower, until the heap has room for the growing cache."""
DECODE_STEPS = 16
_REPLAYS = 30
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
        graphs = ", CUDA graphs" if is_gpu(self.device) else ""
        return f"torch {torch.__version__}, transformers {transformers.__version__}{graphs}"

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
        if is_gpu(self.device):
            release_memory()  # a graph's memory has blocks of its own sizes
        return measured

    def build(self, config: PuzzleConfig) -> PuzzleForCausalLM:
        """A model with random weights out of a pool, so that the next one costs neither memory nor time."""
        model = empty_model(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        # Parts of the pool start at cache lines, as torch's own allocations do.
        sizes = [-(-shape.numel() // 64) * 64 for shape in shapes.values()]
        if sum(sizes) > len(self._pool):
            self._pool = self._pool.new_empty(0)  # frees it before there is a larger one
            self._pool = torch.empty(sum(sizes), dtype=self._dtype, device=self.device).normal_(std=0.02)
        parts = zip(shapes.items(), self._pool[: sum(sizes)].split(sizes), strict=True)
        state = {name: part[: shape.numel()].view(shape) for (name, shape), part in parts}
        model.load_state_dict(state, strict=False, assign=True)
        return finish(model, self.device)


class FixedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values after one more token than `grown` holds, whose place each step's token takes."""

    def __init__(self, grown: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values = (torch.cat([past, past[:, :, -1:]], dim=2) for past in (grown.keys, grown.values))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


def fixed_step(model: PuzzleForCausalLM, cache: Cache, tokens_B1: Tensor, position: int) -> Callable[[], Tensor]:
    """A decode step that reads what `cache` holds, can be taken any number of times, and asks the device nothing.

    It returns the logits, [B, 1, V], and puts the likeliest tokens into `tokens_B1`. Every key is seen, also of windows
    with sinks, whose caches hold no others: so there are no masks.
    """
    fixed = Cache(layers=[FixedCacheLayer(layer) for layer in cache.layers])
    layers = cast(Sequence[PuzzleDecoderLayer], model.model.layers)
    masks = {"full_attention": None} | {layer.mask_name: None for layer in layers}
    positions_B1 = torch.full_like(tokens_B1, position)

    def step() -> Tensor:
        logits_B1V: Tensor = model(tokens_B1, masks, positions_B1, fixed, use_cache=True).logits
        tokens_B1.copy_(logits_B1V.argmax(-1))
        return logits_B1V

    return step


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
        middle = max(0, scenario.generated_tokens // 2 - 1)
        skipped = middle if is_gpu(device) else max(0, (scenario.generated_tokens - DECODE_STEPS) // 2 - WARM_UP_STEPS)
        for layer in cache.layers:
            layer.update(*(past[:, :, -1:].expand(-1, -1, skipped, -1) for past in (layer.keys, layer.values)))
        if is_gpu(device):
            position = scenario.prompt_tokens + skipped
            steps_ms = replays_ms(device, fixed_step(model, cache, tokens_BT, position), WARM_UP_STEPS + _REPLAYS)
        else:
            steps_ms = times_ms(device, step, WARM_UP_STEPS + DECODE_STEPS)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        found = f"{batch_size} x {scenario.total_tokens} tokens do not fit into the memory of {device_name(device)}"
        raise PuzzleError(f"scenario.batch_sizes: {found}; use smaller batch sizes or shorter texts") from None
    return Sample(prefill_ms, statistics.median(steps_ms[WARM_UP_STEPS:]))
