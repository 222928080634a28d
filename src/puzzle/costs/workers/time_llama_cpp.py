"""Times GGUF files in llama.cpp, in the process of `serve.py`."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

llama_cpp.llama_backend_init()

_MICRO_BATCH = 512
"""Tokens that are computed at once; the server's default."""


class _Sequences:
    """A batch of sequences in one context, each with a cache of its own."""

    def __init__(self, model: Any, request: dict[str, Any], batch_size: int) -> None:
        self.size, self.length = batch_size, 0
        self._capacity = self.size * request["prompt_tokens"]
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._context = llama_cpp.llama_init_from_model(model, self._parameters(request))
        if self._context is None:
            raise MemoryError("no context of this batch size and length; see llama.cpp's log")
        self._batch = llama_cpp.llama_batch_init(self._capacity, 0, 1)

    def _parameters(self, request: dict[str, Any]) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = self.size * (request["prompt_tokens"] + request["generated_tokens"] + request["steps"])
        parameters.n_batch, parameters.n_ubatch = self._capacity, min(_MICRO_BATCH, self._capacity)
        parameters.n_seq_max = self.size
        parameters.n_threads = parameters.n_threads_batch = request["threads"]
        parameters.type_k = parameters.type_v = request["cache_type"]
        # Without it the cache of all layers is as wide as the widest.
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return parameters

    def extend(self, tokens: int) -> None:
        """Let every sequence read so many tokens more, and compute the logits of its last."""
        batch = self._batch
        batch.n_tokens = self.size * tokens
        for sequence in range(self.size):
            for offset in range(tokens):
                index, position = sequence * tokens + offset, self.length + offset
                batch.token[index] = (7 * sequence + position) % self._vocabulary
                batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0] = position, 1, sequence
                batch.logits[index] = offset == tokens - 1
        self.length += tokens

    def compute(self) -> None:
        """What `extend` has asked for."""
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode ended with {code}")
        llama_cpp.llama_synchronize(self._context)

    def clear(self) -> None:
        """Forget everything; every page of the cache has been written then."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self.length = 0

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


def measure(request: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """Prefill and decode step in ms, of every round, for each batch size.

    Args:
        request: also has "cache_type", "warm_up_steps" and "steps".
    """
    with _loaded(request["model"]) as model:
        return [
            [_round(model, request, batch_size) for _ in range(request["rounds"])]
            for batch_size in request["batch_sizes"]
        ]


def _round(model: Any, request: dict[str, Any], batch_size: int) -> tuple[float, float]:
    """One prefill, then decode steps around the middle of the answer."""
    # Of one thread the processor time says more: it leaves out what other programs take.
    clock = time.process_time if request["threads"] == 1 else time.perf_counter
    sequences = _Sequences(model, request, batch_size)

    def milliseconds(tokens: int) -> float:
        sequences.extend(tokens)
        began = clock()
        sequences.compute()
        return 1e3 * (clock() - began)

    milliseconds(min(request["prompt_tokens"], -(-_MICRO_BATCH // sequences.size)))
    sequences.clear()
    prefill_ms = milliseconds(request["prompt_tokens"])
    skipped = (request["generated_tokens"] - request["steps"]) // 2 - request["warm_up_steps"]
    while skipped > 0:
        milliseconds(min(skipped, request["prompt_tokens"]))
        skipped -= request["prompt_tokens"]
    for _ in range(request["warm_up_steps"]):
        milliseconds(1)
    decode_ms = statistics.median(milliseconds(1) for _ in range(request["steps"]))
    sequences.close()
    return prefill_ms, decode_ms


@contextmanager
def _loaded(path: str) -> Iterator[Any]:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if model is None:
        raise ValueError("the file is not loaded; see llama.cpp's log")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)
