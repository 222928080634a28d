"""Times models in the process of an engine; run by the interpreter of its environment: imports nothing of puzzle.

    python worker.py ENGINE

Reads one request a line from standard input (see `ProcessEngine`) and writes one line to standard output:
{"samples": [[[prefill_ms, decode_ms], ...one a round], ...one list a batch size]} or {"error": "..."}.
"""

import gc
import json
import os
import statistics
import sys
import time
from typing import Any

Request = dict[str, Any]
Samples = list[list[tuple[float, float]]]
_MICRO_BATCH = 512
"""Tokens that llama.cpp computes at once; its server's default."""


def time_llama_cpp(request: Request) -> Samples:
    """A GGUF file; the request also has "cache_type", "warm_up_steps" and "steps"."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
    if model is None:
        raise ValueError("the file is not loaded; see llama.cpp's log")
    rounds = range(request["rounds"])
    try:
        return [[_llama_cpp_round(model, request, size) for _ in rounds] for size in request["batch_sizes"]]
    finally:
        llama_cpp.llama_model_free(model)


def _llama_cpp_round(model: Any, request: Request, size: int) -> tuple[float, float]:
    """A prefill, after a micro-batch that does not count; then decode steps around the middle of the answer."""
    import llama_cpp

    prompt, generated, steps = request["prompt_tokens"], request["generated_tokens"], request["steps"]
    tokens_at_once = size * prompt
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = size * (prompt + generated + steps), size
    parameters.n_batch, parameters.n_ubatch = tokens_at_once, min(_MICRO_BATCH, tokens_at_once)
    parameters.n_threads = parameters.n_threads_batch = request["threads"]
    parameters.type_k = parameters.type_v = request["cache_type"]
    parameters.swa_full = False  # as its server: layers with windows cache no more than they need
    # Without it the cache of all layers is as wide as the widest.
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    if context is None:
        raise MemoryError("no context of this batch size and length; see llama.cpp's log")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch, length = llama_cpp.llama_batch_init(tokens_at_once, 0, 1), 0
    # Of one thread the processor's time says more: it leaves out what other programs take.
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
    for skipped in range((generated - steps) // 2 - request["warm_up_steps"], 0, -prompt):
        read_ms(min(skipped, prompt))
    steps_ms = [read_ms(1) for _ in range(request["warm_up_steps"] + steps)]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return prefill_ms, statistics.median(steps_ms[-steps:])


def time_vllm(request: Request) -> Samples:
    """A checkpoint, in one engine; the request also has "cache_gib", for a CPU, and further "settings" of the engine.

    A prefill is a batch of requests for one token; a decode step what each further token adds.
    """
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(request["cache_gib"]),  # else it takes nearly all memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes as many threads as it likes
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its times are not those of messages
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.freeze()  # else each of the engine's many collections looks through all modules: half the time of its start
    prompt, generated, cuda = request["prompt_tokens"], request["generated_tokens"], torch.cuda.is_available()
    largest = max(request["batch_sizes"])
    clock = time.perf_counter if cuda or request["threads"] > 1 else time.process_time  # as for llama.cpp

    def answer_ms(batch_size: int, tokens: int) -> float:
        rows = ([(7 * row + column) % vocabulary for column in range(prompt)] for row in range(batch_size))
        prompts = [{"prompt_token_ids": row} for row in rows]
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        began = clock()
        llm.generate(prompts, parameters, use_tqdm=False)
        return 1e3 * (clock() - began)

    try:
        llm = LLM(
            model=request["model"],
            trust_remote_code=True,
            max_model_len=prompt + generated,
            max_num_seqs=largest,
            max_num_batched_tokens=max(8192, prompt) if cuda else largest * prompt,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=not cuda,  # on a CPU compiling each of many stacks takes longer than all measurements
            **request["settings"],
        )
        vocabulary, samples = llm.llm_engine.model_config.get_vocab_size(), []
        for batch_size in request["batch_sizes"]:
            answer_ms(batch_size, min(4, generated))
            pairs = [(answer_ms(batch_size, 1), answer_ms(batch_size, generated)) for _ in range(request["rounds"])]
            samples.append([(first, (whole - first) / max(1, generated - 1)) for first, whole in pairs])
        return samples
    finally:
        llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    measure = {"llama.cpp": time_llama_cpp, "vllm": time_vllm}[sys.argv[1]]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print what they like to standard output
    for line in sys.stdin:
        try:
            answer: Request = {"samples": measure(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
