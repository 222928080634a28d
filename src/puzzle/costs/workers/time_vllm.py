"""Times checkpoints in vLLM, in the process of `serve.py`: one engine for all batch sizes and rounds of a model."""

import gc
import os
import time
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes as many threads as it likes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its times are not those of messages
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

Rounds = list[tuple[float, float]]
"""Prefill and decode step in ms, of every round."""


def measure(request: dict[str, Any]) -> list[Rounds]:
    """The rounds of each batch size.

    Args:
        request: also has "load_format", "model_impl", "dtype", "cache_gib" (on a CPU) and "memory_share" (on a GPU).
    """
    import torch
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    largest, prompt, cuda = max(request["batch_sizes"]), request["prompt_tokens"], torch.cuda.is_available()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(request["cache_gib"])  # on a CPU vLLM else takes nearly all memory
    try:
        llm = LLM(
            model=request["model"],
            trust_remote_code=True,
            model_impl=request["model_impl"],
            load_format=request["load_format"],
            dtype=request["dtype"],
            max_model_len=prompt + request["generated_tokens"],
            max_num_seqs=largest,
            max_num_batched_tokens=max(8192, prompt) if cuda else largest * prompt,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=not cuda,  # on a CPU compiling each of many stacks takes longer than all measurements
            gpu_memory_utilization=request["memory_share"],
        )
        return [_rounds(llm, request, batch_size, cuda) for batch_size in request["batch_sizes"]]
    finally:
        llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


def _rounds(llm: Any, request: dict[str, Any], batch_size: int, cuda: bool) -> Rounds:
    """A prefill is a batch of requests for one token; a decode step what each further token adds."""
    from vllm import SamplingParams

    vocabulary, generated = llm.llm_engine.model_config.get_vocab_size(), request["generated_tokens"]
    prompts = [
        {"prompt_token_ids": [(7 * row + column) % vocabulary for column in range(request["prompt_tokens"])]}
        for row in range(batch_size)
    ]
    # Of one thread the processor time says more: it leaves out what other programs take.
    clock = time.process_time if not cuda and request["threads"] == 1 else time.perf_counter

    def milliseconds(tokens: int) -> float:
        began = clock()
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        llm.generate(prompts, parameters, use_tqdm=False)
        return 1e3 * (clock() - began)

    milliseconds(min(4, generated))
    pairs = [(milliseconds(1), milliseconds(generated)) for _ in range(request["rounds"])]
    return [(first, (whole - first) / max(1, generated - 1)) for first, whole in pairs]
