"""Runs in vLLM's own Python environment: log-probabilities of a prompt and greedy answers of checkpoints.

    python vllm_worker.py REQUESTS.json ANSWERS.json

A request is {"model": folder, "tokens": [ids], "logits": path of the .npy to write, "greedy": how many tokens to
answer}; an answer is {"greedy": [ids]} or {"error": text}. Written are, for every token but the first, the
log-probabilities of what could have stood there, [T - 1, V].
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def answer(request: dict) -> dict:
    llm = LLM(
        model=request["model"],
        trust_remote_code=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=1,
        max_logprobs=-1,
        kv_cache_memory_bytes=2**25,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
    parameters = SamplingParams(
        max_tokens=max(1, request["greedy"]), ignore_eos=True, detokenize=False, temperature=0.0, prompt_logprobs=-1
    )
    prompt = {"prompt_token_ids": request["tokens"]}
    (output,) = llm.generate([prompt], parameters, use_tqdm=False)
    rows = [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
    np.save(request["logits"], np.array(rows, dtype=np.float32))
    return {"greedy": list(output.outputs[0].token_ids)[: request["greedy"]]}


def main() -> None:
    answers = []
    for request in json.loads(Path(sys.argv[1]).read_text()):
        try:
            answers.append(answer(request))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
        cleanup_dist_env_and_memory()
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
