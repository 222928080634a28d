"""The engine `torch`: what is run and counted; no times, which belong to a machine."""

import itertools
import resource
from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle
from transformers import DynamicCache

from puzzle.artefacts import Scenario
from puzzle.costs import time_checkpoints
from puzzle.costs import torch_engine as engine_module
from puzzle.costs.allocator import freed_memory_kept, keeps_memory
from puzzle.costs.torch_engine import DECODE_STEPS, WARM_UP_STEPS, TorchEngine
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, save_checkpoint
from puzzle.variants import Architecture, BlockVariant


def scenario(prompt: int = 6, generated: int = 40, dtype: str = "float32") -> Scenario:
    return Scenario(engine="torch", device="cpu", dtype=dtype, prompt_tokens=prompt, generated_tokens=generated)


class Recorder:
    """The forwards of a model: tokens given, tokens in the cache after them, logits returned."""

    def __init__(self, model: PuzzleForCausalLM) -> None:
        self.calls: list[tuple[int, int, int]] = []
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model: object, args: tuple, kwargs: dict, output: object) -> None:
        cache: DynamicCache = kwargs["past_key_values"]
        self.calls.append((args[0].shape[1], cache.get_seq_length(), output.logits.shape[1]))


def test_a_measurement_is_a_prefill_and_steps_around_the_middle_of_the_answer() -> None:
    model = pico_puzzle("none+w16", "kv2+none", "kv1+w48")
    recorder = Recorder(model)
    engine_module.time_model(model, scenario(prompt=6, generated=40), batch_size=2)
    prefill, *steps = recorder.calls
    assert prefill == (6, 6, 1)
    assert [tokens for tokens, _, _ in steps] == [1] * (WARM_UP_STEPS + DECODE_STEPS)
    timed_lengths = [length for _, length, _ in steps[WARM_UP_STEPS:]]
    assert sum(timed_lengths) / DECODE_STEPS == pytest.approx(6 + 40 / 2, abs=1)


def test_a_window_is_timed_with_what_it_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache never exceeds the bound, and the positions go on."""
    model = pico_puzzle("kv2win8+w16", "kv4+w16", "kv1win5s3+w48")
    held: list[list[int]] = []
    model.register_forward_hook(
        lambda _, args, kwargs, output: held.append([x.keys.shape[-2] for x in kwargs["past_key_values"].layers]),
        with_kwargs=True,
    )
    positions: list[int] = []
    model.model.rotary_emb.register_forward_hook(
        lambda _, args, kwargs, output: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    recorder = Recorder(model)
    engine_module.time_model(model, scenario(prompt=4, generated=80), batch_size=2)
    extended = (80 - DECODE_STEPS) // 2 - WARM_UP_STEPS
    lengths = [4, *range(5 + extended, 5 + extended + WARM_UP_STEPS + DECODE_STEPS)]
    assert held == [[4, 4, 4], *([7, length, 7] for length in lengths[1:])]
    assert [length for _, length, _ in recorder.calls] == lengths
    assert positions == [length - 1 for length in lengths]


def test_a_short_answer_is_measured_right_after_the_prompt() -> None:
    model = pico_puzzle("kv4+w16")
    recorder = Recorder(model)
    engine_module.time_model(model, scenario(prompt=1, generated=1), batch_size=1)
    assert [length for _, length, _ in recorder.calls][:2] == [1, 2]


def test_the_median_step_counts_and_warm_up_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [7.0] + [50.0] * WARM_UP_STEPS + [2.0] * (DECODE_STEPS - 7) + [90.0] * 7
    readings = itertools.accumulate(itertools.chain.from_iterable((1.0, seconds) for seconds in step_s))
    monkeypatch.setattr(engine_module, "_now", lambda device: next(readings))
    sample = engine_module.time_model(pico_puzzle("kv4+w16"), scenario(), batch_size=1)
    assert (sample.prefill_ms, sample.decode_ms) == pytest.approx((7e3, 2e3))


def test_stack_has_the_blocks_asked_for_and_no_weight_twice() -> None:
    engine = TorchEngine(pico_puzzle("kv4+w48", "kv4+w48").config, scenario(dtype="bfloat16"))
    blocks = [BlockVariant.parse(name) for name in ("kv4+w48", "none+w16", "none+none", "linear+linear")]
    model = engine._build(blocks)
    assert Architecture.of(model.config).blocks == tuple(blocks)
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert all(parameter.isfinite().all() and parameter.any() for parameter in parameters)
    spans = sorted((parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes) for parameter in parameters)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stacks_run_in_every_dtype(dtype: str) -> None:
    engine = TorchEngine(pico_puzzle("kv4+w48").config, scenario(dtype=dtype))
    for names in (("kv4+w48", "kv1+none"), ("kv2win4+w8", "kv4win9s2+w8"), ("none+none",) * 3):
        with engine.conditions():
            sample = engine.measure([BlockVariant.parse(name) for name in names], 2)
        assert min(sample.prefill_ms, sample.decode_ms) > 0


def test_environment_names_versions_device_and_threads() -> None:
    environment = TorchEngine(pico_puzzle("kv4+w48").config, scenario()).environment
    assert torch.__version__ in environment["engine"]
    assert environment["threads"] == str(torch.get_num_threads())
    assert environment["device"]


def test_checkpoints_are_measured_in_turns_after_a_run_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = iter([100.0, 1.0, 100.0, 2.0, 3.0, 4.0])  # of the prefills
    order: list[str] = []

    def fake(model: PuzzleForCausalLM, scenario: Scenario, batch_size: int) -> engine_module.Sample:
        order.append(str(len(model.model.layers)))
        return engine_module.Sample(prefill_ms=next(seconds), decode_ms=0.5)

    monkeypatch.setattr(engine_module, "time_model", fake)
    parent, child = pico_puzzle("kv4+w48", "kv4+w48"), pico_puzzle("kv1+w16")
    checkpoints = {"parent": tmp_path / "parent", "child": tmp_path / "child"}
    for model, path in zip((parent, child), checkpoints.values(), strict=True):
        save_checkpoint(model, path, extra_files_from=None)
    times = time_checkpoints(parent.config, checkpoints, scenario(), batch_size=1, repeats=2)
    assert order == ["2", "2", "1", "1", "2", "1"]
    assert times["parent"].prefill_ms == pytest.approx(1.5)  # lower quartile of 1 and 3
    assert times["child"].prefill_ms == pytest.approx(2.5)
    assert times["parent"].prefill_ms_spread == pytest.approx(0.5)
    assert times["parent"].decode_ms == 0.5


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_large_a_batch_is_said_in_one_line(error: RuntimeError) -> None:
    model = pico_puzzle("kv4+w48")
    model.model.layers[0].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(PuzzleError, match=r"scenario.batch_sizes: 4 x 46 tokens do not fit") as caught:
        engine_module.time_model(model, scenario(), batch_size=4)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = pico_puzzle("kv4+w48")
    model.model.layers[0].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine_module.time_model(model, scenario(), batch_size=1)


def test_freed_memory_is_kept_only_while_measuring() -> None:
    if not keeps_memory(torch.device("cpu")):
        pytest.skip("another C library")
    with freed_memory_kept():
        faults_of_a_new_tensor()
        kept = faults_of_a_new_tensor()
    given_back = faults_of_a_new_tensor()
    assert kept < PAGES / 10
    assert given_back > PAGES / 2


PAGES = 128 * 2**20 // 4096


def faults_of_a_new_tensor() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(PAGES * 4096, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
