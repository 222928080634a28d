"""The engine `llama.cpp`: what its process is asked, beside a stand-in, and errors; and the real one, if installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tests.conftest import pico_puzzle
from tests.costs.conftest import installed

from puzzle.artefacts import Scenario
from puzzle.costs import Sample
from puzzle.costs.process_engines import LlamaCppEngine
from puzzle.errors import PuzzleError
from puzzle.modeling import save_checkpoint

SCENARIO = Scenario(engine="llama.cpp", device="cpu", dtype="bfloat16", prompt_tokens=16, generated_tokens=8)
# Called as `python serve.py SCRIPT DESCRIPTOR`; notes requests, and keeps the files they name.
STAND_IN = """#!{python}
import json, os, shutil, sys
if sys.argv[1] == "-c":
    print("1.2.3")
    sys.exit()
answers = os.fdopen(int(sys.argv[3]), "w", buffering=1)
for count, line in enumerate(sys.stdin):
    request = json.loads(line)
    shutil.copy(request["model"], {folder!r} + f"/{{count}}.gguf")
    with open({folder!r} + "/requests", "a") as file:
        file.write(line)
    if 13 in request["batch_sizes"]:
        answers.write(json.dumps({{"error": "MemoryError: no\\nroom"}}) + "\\n")
    else:
        samples = [[[4.0, 0.5 * size]] * request["rounds"] for size in request["batch_sizes"]]
        answers.write(json.dumps({{"samples": samples}}) + "\\n")
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaCppEngine:
    python = tmp_path / "llama-cpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    python.chmod(0o755)
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    return LlamaCppEngine(SCENARIO)


def test_a_model_is_a_file_of_its_shapes_with_random_weights(engine: LlamaCppEngine, tmp_path: Path) -> None:
    config = pico_puzzle("kv4+w48", "kv1+w16").config
    with engine.conditions():
        one, three = engine.measure(config, [1, 3], 2)
    assert one == [Sample(prefill_ms=4.0, decode_ms=0.5)] * 2
    assert three == [Sample(prefill_ms=4.0, decode_ms=1.5)] * 2
    assert engine.environment["engine"] == "llama.cpp (llama-cpp-python 1.2.3)"
    (request,) = map(json.loads, (tmp_path / "requests").read_text().splitlines())
    assert (request["prompt_tokens"], request["generated_tokens"], request["batch_sizes"]) == (16, 8, [1, 3])
    assert (request["threads"], request["cache_type"]) == (torch.get_num_threads(), 30)
    assert not Path(request["model"]).exists()
    reader = GGUFReader(tmp_path / "0.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_k.weight"].shape.tolist() == [32, 48]
    assert tensors["blk.1.attn_k.weight"].shape.tolist() == [32, 12]
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [16, 32]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "BF16"}
    assert all(tensor.data.any() for tensor in reader.tensors)


def test_a_checkpoint_is_timed_by_its_shapes(engine: LlamaCppEngine, tmp_path: Path) -> None:
    model = pico_puzzle("none+w24", "linear+none")
    save_checkpoint(model, tmp_path / "child", extra_files_from=tmp_path)
    with engine.conditions():
        engine.measure(tmp_path / "child", [1], 1)
        engine.measure(model.config, [1], 1)
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


def test_what_llama_cpp_refuses_is_one_line(engine: LlamaCppEngine) -> None:
    with engine.conditions(), pytest.raises(PuzzleError, match=r"llama\.cpp cannot run this") as caught:
        engine.measure(pico_puzzle("kv4+w48").config, [13], 1)
    assert "\n" not in str(caught.value)


def test_a_variant_without_a_form_there_is_refused_by_name(engine: LlamaCppEngine) -> None:
    with engine.conditions(), pytest.raises(PuzzleError, match=r"layer 1: .*window"):
        engine.measure(pico_puzzle("kv4+w48", "kv4win8+w48").config, [1], 1)


def test_a_missing_engine_says_how_to_get_it(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_ENGINES", "/nowhere")
    with pytest.raises(PuzzleError, match="`puzzle engines install llama-cpp` does it"), engine.conditions():
        pass


def test_the_real_engine() -> None:
    """Batch sizes in one go, mixed blocks, and on after a refusal."""
    installed("llama-cpp")
    engine = LlamaCppEngine(SCENARIO)
    with engine.conditions():
        for names in (["kv4+w48", "kv1+none", "linear+w16"], ["none+w48", "kv2+w48"]):
            measured = engine.measure(pico_puzzle(*names).config, [1, 2], 3)
            assert [len(samples) for samples in measured] == [3, 3]
            assert all(sample.prefill_ms > 0 and sample.decode_ms > 0 for samples in measured for sample in samples)
