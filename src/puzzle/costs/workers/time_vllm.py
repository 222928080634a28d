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


def measure(request: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """Prefill and decode step in ms, of every round, for each batch size.

    A prefill is a batch of requests for one token; a decode step what each further token adds.

    Args:
        request: also has "cache_gib", for a CPU, and further "settings" of the engine.
    """
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.freeze()  # else each of the engine's many collections looks through all modules: half the time of its start

    prompt, generated, cuda = request["prompt_tokens"], request["generated_tokens"], torch.cuda.is_available()
    largest, rounds = max(request["batch_sizes"]), range(request["rounds"])
    # Of one thread the processor time says more: it leaves out what other programs take.
    clock = time.process_time if not cuda and request["threads"] == 1 else time.perf_counter

    def answer_ms(batch_size: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7 * row + column) % vocabulary for column in range(prompt)]}
            for row in range(batch_size)
        ]
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        began = clock()
        llm.generate(prompts, parameters, use_tqdm=False)
        return 1e3 * (clock() - began)

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(request["cache_gib"])  # on a CPU vLLM else takes nearly all memory
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
            pairs = [(answer_ms(batch_size, 1), answer_ms(batch_size, generated)) for _ in rounds]
            samples.append([(first, (whole - first) / max(1, generated - 1)) for first, whole in pairs])
        return samples
    finally:
        llm = None
        cleanup_dist_env_and_memory()
        gc.collect()
