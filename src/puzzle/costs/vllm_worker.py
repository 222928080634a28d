"""Times checkpoints in vLLM: run by the interpreter of vLLM's environment, so it imports nothing of puzzle.

Reads one request a line from standard input, answers each with one line on the descriptor named in argv[1]:
{"checkpoint", "load_format", "model_impl", "dtype", "batch_size", "prompt_tokens", "generated_tokens", "rounds",
"cache_gib"} -> {"prefill_ms": [...], "decode_ms": [...]} or {"error": "..."}.
"""

import gc
import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes as many threads as it likes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its times are not those of messages
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def measure(request: dict[str, Any]) -> dict[str, list[float]]:
    """A prefill is a request for one token; a decode step what each further token adds."""
    import torch
    from vllm import LLM, SamplingParams

    batch, prompt, generated = (request[name] for name in ("batch_size", "prompt_tokens", "generated_tokens"))
    cuda = torch.cuda.is_available()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(request["cache_gib"])  # on a CPU vLLM else takes nearly all memory
    llm = LLM(
        model=request["checkpoint"],
        trust_remote_code=True,
        model_impl=request["model_impl"],
        load_format=request["load_format"],
        dtype=request["dtype"],
        max_model_len=prompt + generated,
        max_num_seqs=batch,
        max_num_batched_tokens=batch * prompt if not cuda else max(8192, prompt),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=not cuda,  # on a CPU compiling each of many stacks takes longer than all measurements
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [(7 * i + j) % vocabulary for j in range(prompt)]} for i in range(batch)]

    # Of one thread the processor time says more: it leaves out what other programs take.
    clock = time.process_time if not cuda and os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter

    def seconds(tokens: int) -> float:
        began = clock()
        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)
        llm.generate(prompts, parameters, use_tqdm=False)
        return clock() - began

    seconds(min(4, generated))
    rounds = [(seconds(1), seconds(generated)) for _ in range(request["rounds"])]
    steps = max(1, generated - 1)
    return {
        "prefill_ms": [1e3 * first for first, _ in rounds],
        "decode_ms": [1e3 * (whole - first) / steps for first, whole in rounds],
    }


def main() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    # Standard output belongs to vLLM and what it calls; answers have a descriptor of their own.
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as answers:
        for line in sys.stdin:
            try:
                answer: dict[str, Any] = measure(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            cleanup_dist_env_and_memory()
            gc.collect()
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
