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
        return [[_round(model, request, size) for _ in range(request["rounds"])] for size in request["batch_sizes"]]
    finally:
        llama_cpp.llama_model_free(model)


def _round(model: Any, request: dict[str, Any], size: int) -> tuple[float, float]:
    """A prefill, after a micro-batch that does not count; then decode steps around the middle of the answer.

    Every sequence of the batch has a cache of its own.
    """
    prompt, generated, steps = request["prompt_tokens"], request["generated_tokens"], request["steps"]
    tokens_at_once = size * prompt
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = size * (prompt + generated + steps), size
    parameters.n_batch, parameters.n_ubatch = tokens_at_once, min(_MICRO_BATCH, tokens_at_once)
    parameters.n_threads = parameters.n_threads_batch = request["threads"]
    parameters.type_k = parameters.type_v = request["cache_type"]
    # Without it the cache of all layers is as wide as the widest.
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    if context is None:
        raise MemoryError("no context of this batch size and length; see llama.cpp's log")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch, length = llama_cpp.llama_batch_init(tokens_at_once, 0, 1), 0
    # Of one thread the processor time says more: it leaves out what other programs take.
    clock = time.process_time if request["threads"] == 1 else time.perf_counter

    def read_ms(tokens: int) -> float:
        """Milliseconds in which every sequence reads so many tokens more, with the logits of its last."""
        nonlocal length
        batch.n_tokens = size * tokens
        for index in range(size * tokens):
            sequence, offset = divmod(index, tokens)
            batch.token[index], batch.pos[index] = (7 * sequence + length + offset) % vocabulary, length + offset
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = offset == tokens - 1
        length += tokens
        began = clock()
        if (code := llama_cpp.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode ended with {code}")
        llama_cpp.llama_synchronize(context)
        return 1e3 * (clock() - began)

    read_ms(min(prompt, -(-_MICRO_BATCH // size)))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)  # has written every page of the cache
    length = 0
    prefill_ms = read_ms(prompt)
    skipped = (generated - steps) // 2 - request["warm_up_steps"]
    while skipped > 0:
        read_ms(min(skipped, prompt))
        skipped -= prompt
    steps_ms = [read_ms(1) for _ in range(request["warm_up_steps"] + steps)]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return prefill_ms, statistics.median(steps_ms[-steps:])
