"""The engine `torch`: the model as transformers' `generate` runs it, eager, with a cache that grows by concatenation.

Shapes: B batch, T tokens.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from puzzle.artefacts import Scenario
from puzzle.costs.allocator import KEPT, freed_memory_kept, keeps_memory
from puzzle.costs.engine import Sample, clock, processor_name
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish
from puzzle.parents import open_parent
from puzzle.variants import Architecture, BlockVariant

WARM_UP_STEPS = 4
"""The first steps after a prefill are slower, until the heap has room for the growing cache."""
DECODE_STEPS = 16
_ALIGNMENT = 64
"""Elements; torch's own allocations start at cache lines, and so shall the pool's parts."""


class TorchEngine:
    """Stacks of blocks with random weights, of the parent's own shapes."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario) -> None:
        self._config, self._scenario = config, scenario
        self._device, self._dtype = torch.device(scenario.device), getattr(torch, scenario.dtype)
        self._pool = torch.empty(0, dtype=self._dtype, device=self._device)
        self._warm: set[tuple[tuple[BlockVariant, ...], int]] = set()
        self._loaded: dict[Path, PuzzleForCausalLM] = {}

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "engine": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "device": _device_name(self._device),
            "threads": str(torch.get_num_threads()),
            "allocator": KEPT if keeps_memory(self._device) else "as it comes",
        }

    def conditions(self) -> AbstractContextManager[None]:
        return _conditions(self._device)

    def measure(self, blocks: Sequence[BlockVariant], batch_size: int) -> Sample:
        """Time these blocks once; before the first, an uncounted run starts threads and heap (a GPU: per shape)."""
        model = self._build(blocks)
        shape = () if self._device.type == "cpu" else tuple(blocks)
        if (shape, batch_size) not in self._warm:
            time_model(model, self._scenario, batch_size)
            self._warm.add((shape, batch_size))
        return time_model(model, self._scenario, batch_size)

    def measure_checkpoint(self, checkpoint: Path, batch_size: int) -> Sample:
        """Time a whole model; it stays loaded for the next round."""
        if checkpoint not in self._loaded:
            self._loaded[checkpoint] = open_parent(str(checkpoint)).load(dtype=self._dtype, device=self._device)
            time_model(self._loaded[checkpoint], self._scenario, batch_size)
        return time_model(self._loaded[checkpoint], self._scenario, batch_size)

    def _build(self, blocks: Sequence[BlockVariant]) -> PuzzleForCausalLM:
        """The stack with weights out of the pool, so that a new stack costs neither memory nor time."""
        model = empty_model(Architecture(tuple(blocks)).configure(self._config))
        parameters = dict(model.named_parameters())
        sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters.values()]
        if sum(sizes) > len(self._pool):
            self._pool = torch.empty(sum(sizes), dtype=self._dtype, device=self._device).normal_(std=0.02)
        parts = self._pool[: sum(sizes)].split(sizes)
        state = {
            name: part[: parameter.numel()].view(parameter.shape)
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        model.load_state_dict(state, strict=False, assign=True)
        return finish(model, self._device)


def time_model(model: PuzzleForCausalLM, scenario: Scenario, batch_size: int) -> Sample:
    """One prefill, then decode steps around the middle of the answer; a `PuzzleError` if memory does not suffice."""
    try:
        return _time_model(model, scenario, batch_size)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PuzzleError(
            f"scenario.batch_sizes: {batch_size} x {scenario.total_tokens} tokens do not fit into the memory of "
            f"{_device_name(model.device)}; use smaller batch sizes or shorter texts"
        ) from None


@torch.no_grad()
def _time_model(model: PuzzleForCausalLM, scenario: Scenario, batch_size: int) -> Sample:
    cache, device = DynamicCache(config=model.config), model.device
    count = batch_size * scenario.prompt_tokens
    prompt_BT = (torch.arange(count, device=device) % model.config.vocab_size).view(batch_size, -1)
    start = _now(device)
    token_B1 = _step(model, prompt_BT, cache)
    prefill_ms = 1e3 * (_now(device) - start)
    _extend(cache, max(0, (scenario.generated_tokens - DECODE_STEPS) // 2 - WARM_UP_STEPS))
    steps_ms = []
    for _ in range(WARM_UP_STEPS + DECODE_STEPS):
        start = _now(device)
        token_B1 = _step(model, token_B1, cache)
        steps_ms.append(1e3 * (_now(device) - start))
    return Sample(prefill_ms=prefill_ms, decode_ms=statistics.median(steps_ms[WARM_UP_STEPS:]))


def _step(model: PuzzleForCausalLM, tokens_BT: Tensor, cache: DynamicCache) -> Tensor:
    """The next token of every sequence, [B, 1]."""
    output = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits.argmax(-1)


def _extend(cache: DynamicCache, tokens: int) -> None:
    """Let the cache have seen `tokens` more: copies of the last one, for only the length sets the time.

    What a layer with a window then holds is what it would hold: each layer drops by itself what is too old.
    """
    for layer in cache.layers:
        layer.update(*(past[:, :, -1:].expand(-1, -1, tokens, -1) for past in (layer.keys, layer.values)))


def _now(device: torch.device) -> float:
    """Seconds, when all work given to the device is done; `generate` waits for every token as well."""
    if device.type == "cpu":
        return clock(torch.get_num_threads())()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def _conditions(device: torch.device) -> AbstractContextManager[None]:
    return freed_memory_kept() if keeps_memory(device) else nullcontext()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
