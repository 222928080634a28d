"""A child as people serve it: the engines' own servers, asked through the client that everyone uses."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from tests.engines.parity import VOCAB, greedy, save
from tests.engines.readers import required
from transformers import AutoTokenizer

from puzzle.engines.environments import python_of
from puzzle.export import export_gguf
from puzzle.modeling import PuzzleForCausalLM, save_checkpoint

BLOCKS = ("none+w48", "kv1+none", "kv2+w16", "linear+w48", "none+none", "kv4+w16")
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}answer: "
MESSAGES = [{"role": "user", "content": "How are you?"}]
TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_START_S = 300


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[PuzzleForCausalLM, Path]:
    """Of many kinds of blocks; answers in small letters, which servers hand on as they are."""
    folder = tmp_path_factory.mktemp("served")
    model, files = save(folder / "any", *BLOCKS, head_dim=32, tie_word_embeddings=False)
    letters = AutoTokenizer.from_pretrained(files)(LETTERS).input_ids
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(VOCAB) if token not in letters]] = 0.0
    (files / "chat_template.jinja").write_text(TEMPLATE)
    save_checkpoint(model, folder / "child", extra_files_from=files)
    return model, folder / "child"


def test_llama_server(child: tuple[PuzzleForCausalLM, Path], tmp_path: Path) -> None:
    server = required(lambda: python_of("llama.cpp").with_name("llama-server"))
    model, path = child
    file = export_gguf(path, tmp_path / "model.gguf", dtype="f32")
    options = {"--model": str(file), "--threads": "1", "--ctx-size": "256", "--parallel": "1"}
    exact = {"--cache-type-k": "f32", "--cache-type-v": "f32", "--flash-attn": "off"}
    with _served([str(server), *_flags(options | exact)], tmp_path / "log") as url:
        assert _answer(url) == _expected(model, path)


def test_vllm(child: tuple[PuzzleForCausalLM, Path], tmp_path: Path) -> None:
    python = required(lambda: python_of("vllm"))
    model, path = child
    options = {"--model": str(path), "--served-model-name": "child", "--dtype": "float32", "--max-model-len": "128"}
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *_flags(options)]
    command += ["--trust-remote-code", "--enforce-eager", "--kv-cache-memory-bytes", str(2**25)]
    with _served(command, tmp_path / "log") as url:
        assert _answer(url) == _expected(model, path)


def _expected(model: PuzzleForCausalLM, path: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    text: str = tokenizer.decode(greedy(model, prompt, TOKENS))
    assert text.isalpha()
    assert len(set(text)) > 3, "too dull to tell models apart"
    return text


def _answer(url: str) -> str | None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="child", messages=MESSAGES, max_tokens=TOKENS, temperature=0.0, timeout=60
        )
    return answer.choices[0].message.content


@contextmanager
def _served(command: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server that answers; it is gone afterwards."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as output:
        address = ["--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen([*command, *address], stdout=output, stderr=output, env=os.environ | offline)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, f"{url}/health", log)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _wait(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    for _ in range(2 * _START_S):
        assert server.poll() is None, f"it ended with {server.returncode}: {log.read_text(errors='replace')[-2000:]}"
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no answer in {_START_S} s: {log.read_text(errors='replace')[-2000:]}")


def _flags(options: Mapping[str, str]) -> list[str]:
    return [part for option in options.items() for part in option]
