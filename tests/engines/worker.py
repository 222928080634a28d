"""Runs in an engine's own Python environment: logits, greedy answers and token ids of exported children.

    python worker.py llama_cpp|vllm REQUESTS.json ANSWERS.json

A request is {"model": path, "tokens": [ids], "logits": path of the .npy to write, "greedy": how many tokens to answer,
"text": text to tokenise}; an answer is {"greedy": [ids], "text": [ids]} or {"error": text}. vLLM writes
log-probabilities, [T - 1, V], of what could have stood where every token but the first does.
"""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np

F32 = 0  # GGML_TYPE_F32


def llama_cpp(request: dict) -> dict:
    import llama_cpp

    tokens, generated = request["tokens"], []
    exact = {"logits_all": True, "type_k": F32, "type_v": F32, "flash_attn": False, "verbose": False}
    length = max(len(tokens) + request["greedy"], 32)
    model = llama_cpp.Llama(request["model"], n_ctx=length, n_threads=1, n_threads_batch=1, **exact)
    model.eval(tokens)
    np.save(request["logits"], model.scores[: len(tokens)].copy())
    for _ in range(request["greedy"]):
        generated.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(generated[-1:])
    text = model.tokenize(request["text"].encode(), add_bos=True, special=True)
    model.close()
    return {"greedy": generated, "text": text}


def vllm(request: dict) -> dict:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.freeze()  # else each of the engine's many collections looks through all modules: half the time of its start

    sizes = {"max_model_len": 128, "max_num_seqs": 1, "max_logprobs": -1, "kv_cache_memory_bytes": 2**25}
    switches = {"trust_remote_code": True, "skip_tokenizer_init": True, "enforce_eager": True}
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "prompt_logprobs": -1}
    try:
        llm = LLM(model=request["model"], dtype="float32", enable_prefix_caching=False, **sizes, **switches)
        parameters = SamplingParams(max_tokens=max(1, request["greedy"]), **greedy)
        (output,) = llm.generate([{"prompt_token_ids": request["tokens"]}], parameters, use_tqdm=False)
    finally:
        llm = None
        cleanup_dist_env_and_memory()
        gc.collect()
    rows = [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
    np.save(request["logits"], np.array(rows, dtype=np.float32))
    return {"greedy": list(output.outputs[0].token_ids)[: request["greedy"]], "text": []}


if __name__ == "__main__":
    engine, asked, answered = sys.argv[1:]
    answers = []
    for each in json.loads(Path(asked).read_text()):
        try:
            answers.append({"llama_cpp": llama_cpp, "vllm": vllm}[engine](each))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(answered).write_text(json.dumps(answers))
