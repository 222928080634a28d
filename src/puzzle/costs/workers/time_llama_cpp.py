"""Times GGUF files in llama.cpp, in the process of `serve.py`."""

import statistics
import time
from typing import Any

import llama_cpp

llama_cpp.llama_backend_init()

_MICRO_BATCH = 512
"""Tokens that are computed at once; the server's default."""


def measure(request: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """Prefill and decode step in ms, of every round, for each batch size.

    Args:
        request: also has "cache_type", "warm_up_steps" and "steps".
    """
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
    if model is None:
        raise ValueError("the file is not loaded; see llama.cpp's log")
    try:
        sizes, rounds = request["batch_sizes"], range(request["rounds"])
        return [[_round(_Sequences(model, request, size), request) for _ in rounds] for size in sizes]
    finally:
        llama_cpp.llama_model_free(model)


def _round(sequences: "_Sequences", request: dict[str, Any]) -> tuple[float, float]:
    """A prefill, after a micro-batch that does not count; then decode steps around the middle of the answer."""
    prompt, steps = request["prompt_tokens"], request["steps"]
    sequences.read_ms(min(prompt, -(-_MICRO_BATCH // sequences.size)))
    sequences.clear()
    prefill_ms = sequences.read_ms(prompt)
    skipped = (request["generated_tokens"] - steps) // 2 - request["warm_up_steps"]
    while skipped > 0:
        sequences.read_ms(min(skipped, prompt))
        skipped -= prompt
    steps_ms = [sequences.read_ms(1) for _ in range(request["warm_up_steps"] + steps)]
    sequences.close()
    return prefill_ms, statistics.median(steps_ms[-steps:])


class _Sequences:
    """A batch of sequences in one context, each with a cache of its own."""

    def __init__(self, model: Any, request: dict[str, Any], size: int) -> None:
        self.size, self._length, capacity = size, 0, size * request["prompt_tokens"]
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = size * (request["prompt_tokens"] + request["generated_tokens"] + request["steps"])
        parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = capacity, min(_MICRO_BATCH, capacity), size
        parameters.n_threads = parameters.n_threads_batch = request["threads"]
        parameters.type_k = parameters.type_v = request["cache_type"]
        # Without it the cache of all layers is as wide as the widest.
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if self._context is None:
            raise MemoryError("no context of this batch size and length; see llama.cpp's log")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(capacity, 0, 1)
        # Of one thread the processor time says more: it leaves out what other programs take.
        self._clock = time.process_time if request["threads"] == 1 else time.perf_counter

    def read_ms(self, tokens: int) -> float:
        """Milliseconds in which every sequence reads so many tokens more, with the logits of its last."""
        batch = self._batch
        batch.n_tokens = self.size * tokens
        for sequence in range(self.size):
            for offset in range(tokens):
                index, position = sequence * tokens + offset, self._length + offset
                batch.token[index] = (7 * sequence + position) % self._vocabulary
                batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = position, 1, sequence
                batch.logits[index] = offset == tokens - 1
        self._length += tokens
        began = self._clock()
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode ended with {code}")
        llama_cpp.llama_synchronize(self._context)
        return 1e3 * (self._clock() - began)

    def clear(self) -> None:
        """Forget everything; every page of the cache has been written then."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._length = 0

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
