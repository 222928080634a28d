"""Runs in llama.cpp's own Python environment: logits, greedy answers and token ids of GGUF files.

    python llama_cpp_worker.py REQUESTS.json ANSWERS.json

A request is {"model": path, "tokens": [ids], "logits": path of the .npy to write, "greedy": how many tokens to answer,
"text": text to tokenise}; an answer is {"greedy": [ids], "text": [ids]} or {"error": text}.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

F32 = 0  # GGML_TYPE_F32


def answer(request: dict) -> dict:
    tokens = request["tokens"]
    length = len(tokens) + request["greedy"]
    try:
        model = llama_cpp.Llama(
            request["model"],
            n_ctx=max(length, 32),
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=F32,
            type_v=F32,
            flash_attn=False,
            verbose=False,
        )
    except ValueError as error:
        return {"error": str(error)}
    model.eval(tokens)
    np.save(request["logits"], model.scores[: len(tokens)].copy())
    generated = []
    for _ in range(request["greedy"]):
        generated.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(generated[-1:])
    text = model.tokenize(request["text"].encode(), add_bos=True, special=True)
    model.close()
    return {"greedy": generated, "text": text}


if __name__ == "__main__":
    answers = [answer(request) for request in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps(answers))
