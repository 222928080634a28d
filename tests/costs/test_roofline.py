"""The roofline against sums written out by hand."""

from pathlib import Path

import pytest

from puzzle.artefacts import Scenario
from puzzle.costs import Sample, read_machine
from puzzle.costs.roofline import RooflineEngine
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.variants import Architecture

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
CONFIG = PuzzleConfig(vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, **HEADS)
SHEET = """mine: {peak_tflops: {bfloat16: 1}, memory_gb_s: 100, memory_gb: 8, link_gb_s: 10, link_us: 5,
    compute_share: 0.5, bandwidth_share: 0.5, layer_us: 3}"""


@pytest.fixture
def machine(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(SHEET)
    return str(path)


def engine(machine: str, dtype: str = "bfloat16") -> RooflineEngine:
    return RooflineEngine(
        Scenario(engine="roofline", device=machine, dtype=dtype, prompt_tokens=512, generated_tokens=64)
    )


def times(machine: str, *blocks: str, batch_size: int) -> Sample:
    ((sample,),) = engine(machine).measure(Architecture.parse(blocks).configure(CONFIG), [batch_size], 1)
    return sample


def test_a_decode_step_moves_every_weight_and_the_cache_once(machine: str) -> None:
    found = times(machine, "kv4+w1024", batch_size=1).decode_ms
    attention = 2 * 256 * 256 + 2 * 256 * 128 + 256
    ffn = 3 * 256 * 1024 + 256
    cache, new = (512 + 32) * 2 * 4 * 32, 2 * 4 * 32
    values = attention + 2 * 256 + cache + new + ffn + 2 * 256 + 1000 * 256 + 256
    assert found == pytest.approx(1e3 * 2 * values / (0.5 * 100e9) + 3e-3)
    full, window = (times(machine, block, batch_size=8).decode_ms for block in ("kv4+none", "kv4win100s4+none"))
    assert full - window == pytest.approx(1e3 * 8 * 2 * (544 - 103) * 2 * 4 * 32 / (0.5 * 100e9))


def test_a_prefill_of_a_large_batch_is_bound_by_operations(machine: str) -> None:
    """Attention computes half of all pairs; embeddings and head move more than they compute."""
    ffn, attention, none = (
        times(machine, name, batch_size=32).prefill_ms for name in ("none+w1024", "kv4+none", "none+none")
    )
    tokens = 32 * 512
    assert ffn - none == pytest.approx(1e3 * 2 * (3 * 256 * 1024 + 256) * tokens / (0.5 * 1e12))
    weights, pairs = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 256) * 512, 4 * 256 * 512 * 513 / 2
    assert attention - none == pytest.approx(1e3 * 32 * (weights + pairs) / (0.5 * 1e12))
    assert none == pytest.approx(1e3 * 2 * (1000 * 256 + tokens * 256) / (0.5 * 100e9) + 3e-3)


def test_devices_share_the_work_and_pay_for_the_reduction(machine: str) -> None:
    blocks = ["none+w1024"] * 4
    single, four = times(machine, *blocks, batch_size=32), times(f"4x{machine}", *blocks, batch_size=32)
    layers_ms, moved = 4 * 3e-3, 32 * 512 * 256 * 2 * 2 * 3 / 4
    reduce_ms = 4 * (1e3 * moved / 10e9 + 5e-3)
    assert four.prefill_ms == pytest.approx((single.prefill_ms - layers_ms) / 4 + layers_ms + reduce_ms)
    known, count = read_machine("8xh100-sxm")
    assert read_machine("8xh100") == (known, 8)
    assert (known.memory_gb, count) == (80, 8)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("h1000", "'h1000' is neither one of h100-sxm, "),
        ("text.yaml", "text.yaml: peak_tflops: Input should be a valid dictionary, found 3"),
        ("0xh200", "nor a file; so many of one are 8xh100-sxm"),
    ],
)
def test_an_unknown_machine_is_one_line(name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.yaml").write_text("mine: {peak_tflops: 3}")
    with pytest.raises(PuzzleError, match=line) as raised:
        read_machine(name)
    assert "\n" not in str(raised.value)


def test_a_dtype_without_a_rate_is_one_line(machine: str) -> None:
    with pytest.raises(PuzzleError, match=r"scenario\.dtype: found float32; use one of bfloat16"):
        engine(machine, "float32")
