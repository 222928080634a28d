"""The engine `torch`: the model as transformers' `generate` runs it, eager, with a cache that grows by concatenation.

Shapes: B batch, T tokens.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from transformers import DynamicCache

from puzzle.artefacts import Scenario
from puzzle.costs.allocator import allocator_name, freed_memory_kept
from puzzle.costs.engine import Model, Sample
from puzzle.device import device_name, is_gpu, times_ms
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish
from puzzle.parents import open_parent

WARM_UP_STEPS = 4
"""The first steps after a prefill are slower, until the heap has room for the growing cache."""
DECODE_STEPS = 16
_ALIGNMENT = 64
"""Elements; torch's own allocations start at cache lines, and so shall the pool's parts."""


class TorchEngine:
    """Shapes with random weights, and checkpoints with their own."""

    slow_start: ClassVar[bool] = False

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._device, self._dtype = torch.device(scenario.device), getattr(torch, scenario.dtype)
        self._pool = torch.empty(0, dtype=self._dtype, device=self._device)
        self._loaded: dict[Path, PuzzleForCausalLM] = {}
        self._warm: set[object] = set()

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "engine": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "device": device_name(self._device),
            "threads": str(torch.get_num_threads()),
            "allocator": allocator_name(self._device),
        }

    def conditions(self) -> AbstractContextManager[None]:
        return freed_memory_kept(self._device)

    def measure(self, model: Model, batch_sizes: Sequence[int], rounds: int) -> list[list[Sample]]:
        """Time a model; an uncounted run before the first starts threads and heap (on a GPU: for each shape)."""
        if isinstance(model, PuzzleConfig):
            runnable, shape = self.build(model), str(model.blocks) if is_gpu(self._device) else ""
        else:
            if model not in self._loaded:  # they stay for the next round
                self._loaded[model] = open_parent(str(model)).load(dtype=self._dtype, device=self._device)
            runnable, shape = self._loaded[model], str(model)
        measured = []
        for batch_size in batch_sizes:
            if (shape, batch_size) not in self._warm:
                time_model(runnable, self._scenario, batch_size)
                self._warm.add((shape, batch_size))
            measured.append([time_model(runnable, self._scenario, batch_size) for _ in range(rounds)])
        return measured

    def build(self, config: PuzzleConfig) -> PuzzleForCausalLM:
        """A model with random weights out of a pool, so that the next one costs neither memory nor time."""
        model = empty_model(config)
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


@torch.no_grad()
def time_model(model: PuzzleForCausalLM, scenario: Scenario, batch_size: int) -> Sample:
    """One prefill, then decode steps around the middle of the answer; a `PuzzleError` if memory does not suffice."""
    cache, device = DynamicCache(config=model.config), model.device
    count = batch_size * scenario.prompt_tokens
    tokens_BT = (torch.arange(count, device=device) % model.config.vocab_size).view(batch_size, -1)

    def step() -> None:
        """Let the model read `tokens_BT`, and put the next token of every sequence into its place."""
        nonlocal tokens_BT
        output = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_BT = output.logits.argmax(-1)

    try:
        (prefill_ms,) = times_ms(device, step, 1)
        _extend(cache, max(0, (scenario.generated_tokens - DECODE_STEPS) // 2 - WARM_UP_STEPS))
        # On a GPU launches set this time, as nothing is captured: a graph over a static cache would be replayed here.
        steps_ms = times_ms(device, step, WARM_UP_STEPS + DECODE_STEPS)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PuzzleError(
            f"scenario.batch_sizes: {batch_size} x {scenario.total_tokens} tokens do not fit into the memory of "
            f"{device_name(device)}; use smaller batch sizes or shorter texts"
        ) from None
    return Sample(prefill_ms=prefill_ms, decode_ms=statistics.median(steps_ms[WARM_UP_STEPS:]))


def _extend(cache: DynamicCache, tokens: int) -> None:
    """Let the cache have seen `tokens` more: copies of the last one, for only the length sets the time.

    What a layer with a window then holds is what it would hold: each layer drops by itself what is too old.
    """
    for layer in cache.layers:
        layer.update(*(past[:, :, -1:].expand(-1, -1, tokens, -1) for past in (layer.keys, layer.values)))
