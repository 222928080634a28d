"""The engine `torch`: what is run and counted; no times, which belong to a machine."""

import itertools
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from puzzle.artefacts import Scenario
from puzzle.costs.torch_engine import DECODE_STEPS, WARM_UP_STEPS, TorchEngine, fixed_step, keeps_memory, time_model
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM, save_checkpoint
from puzzle.variants import Architecture


def scenario(prompt: int = 6, generated: int = 40, dtype: str = "float32") -> Scenario:
    return Scenario(engine="torch", device="cpu", dtype=dtype, prompt_tokens=prompt, generated_tokens=generated)


Call = tuple[int, list[int], int, int]
"""A forward: tokens given, tokens that each layer then holds, the last position, logits returned."""


def calls_of(model: PuzzleForCausalLM, scenario: Scenario) -> list[Call]:
    """What a measurement runs."""
    calls: list[Call] = []

    def record(module: object, args: tuple, kwargs: dict, output: object) -> None:
        cache: DynamicCache = kwargs["past_key_values"]
        held = [layer.keys.shape[-2] for layer in cache.layers]
        calls.append((args[0].shape[1], held, cache.get_seq_length(), output.logits.shape[1]))

    model.register_forward_hook(record, with_kwargs=True)
    positions: list[int] = []
    model.model.rotary_emb.register_forward_hook(
        lambda _, args, kwargs, output: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    time_model(model, scenario, batch_size=2)
    assert positions == [length - 1 for _, _, length, _ in calls]
    return calls


def test_a_measurement_is_a_prefill_and_steps_around_the_middle_of_the_answer() -> None:
    prefill, *steps = calls_of(pico_puzzle("none+w16", "kv2+none", "kv1+w48"), scenario(prompt=6, generated=40))
    assert prefill == (6, [6, 6], 6, 1)
    assert [tokens for tokens, *_ in steps] == [1] * (WARM_UP_STEPS + DECODE_STEPS)
    timed_lengths = [length for _, _, length, _ in steps[WARM_UP_STEPS:]]
    assert sum(timed_lengths) / DECODE_STEPS == pytest.approx(6 + 40 / 2, abs=1)
    short = calls_of(pico_puzzle("kv4+w16"), scenario(prompt=1, generated=1))
    assert [length for _, _, length, _ in short][:2] == [1, 2]


def test_a_window_is_timed_with_what_it_would_hold() -> None:
    """Its cache never exceeds the bound, and the positions go on."""
    calls = calls_of(pico_puzzle("kv2win8+w16", "kv4+w16", "kv1win5s3+w48"), scenario(prompt=4, generated=80))
    first = 5 + (80 - DECODE_STEPS) // 2 - WARM_UP_STEPS
    lengths = range(first, first + WARM_UP_STEPS + DECODE_STEPS)
    assert [held for _, held, _, _ in calls] == [[4, 4, 4], *([7, length, 7] for length in lengths)]


STACK = ("kv4+w48", "kv2+none", "none+w16", "kv2win6+w48", "kv4win5s2+w16", "linear+linear", "kv1win9s3+rank4")


@pytest.mark.parametrize("length", [1, 4, 6, 11, 20])
@torch.no_grad()
def test_a_step_that_is_replayed_computes_what_a_growing_cache_does(length: int) -> None:
    """In every kind of attention, windows and sinks included; and again and again, as in a CUDA graph."""
    model, tokens_BT = pico_puzzle(*STACK), random_tokens(2, length + 1)
    cache, last_B1 = DynamicCache(config=model.config), tokens_BT[:, length:]
    model(tokens_BT[:, :length], past_key_values=cache)
    fixed_B1 = last_B1.clone()
    step = fixed_step(model, cache, fixed_B1, length)
    found_B1V = step()
    assert torch.equal(fixed_B1, found_B1V.argmax(-1))
    fixed_B1.copy_(last_B1)
    assert torch.equal(step(), found_B1V)
    torch.testing.assert_close(found_B1V, model(last_B1, past_key_values=cache).logits)


class Masks(TorchFunctionMode):
    """Records of every call of SDPA whether it has a mask, and whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((kwargs["attn_mask"] is not None, kwargs["is_causal"]))
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_attention_gets_no_dense_mask_where_none_is_needed() -> None:
    """A prefill is causal by itself, but where a window ends within the prompt; a replayed step has no mask at all."""
    model = pico_puzzle("kv4+w48", "kv1+w16", "kv2win40+w48", "kv4win40s2+w16", "kv2win6+w16")
    tokens_BT, cache = random_tokens(2, 20), DynamicCache(config=model.config)
    with Masks() as prefill:
        model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert prefill.seen == [(False, True)] * 4 + [(True, False)]
    step = fixed_step(model, cache, tokens_BT[:, -1:].clone(), 20)
    with Masks() as decode:
        step()
    assert decode.seen == [(False, False)] * 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_replays_graphs_of_every_kind_of_block(dtype: str) -> None:
    engine = TorchEngine(replace(scenario(dtype=dtype), device="cuda"))
    assert "CUDA graphs" in engine.environment["engine"]
    config = Architecture.parse(STACK).configure(pico_puzzle("kv4+w48").config)
    small, large = engine.measure(config, [1, 16], 2)
    assert all(sample.decode_ms > 0 for sample in (*small, *large))


def test_stack_has_the_blocks_asked_for_and_no_weight_twice() -> None:
    blocks = Architecture.parse(["kv4+w48", "none+w16", "none+none", "linear+linear"])
    model = TorchEngine(scenario(dtype="bfloat16")).build(blocks.configure(pico_puzzle("kv4+w48").config))
    assert Architecture.of(model.config) == blocks
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert all(parameter.isfinite().all() and parameter.any() for parameter in parameters)
    spans = sorted((parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes) for parameter in parameters)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stacks_and_checkpoints_run_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    """One sample a round for each batch size."""
    config, engine = pico_puzzle("kv4+w48").config, TorchEngine(scenario(dtype=dtype))
    assert torch.__version__ in engine.environment["engine"]
    save_checkpoint(pico_puzzle("kv1+w16", "kv2+w8"), tmp_path / "child", extra_files_from=None)
    stacks = [["kv4+w48", "kv1+none"], ["kv2win4+w8", "kv4win9s2+w8"], ["none+none"] * 3]
    models = [tmp_path / "child", *(Architecture.parse(names).configure(config) for names in stacks)]
    with engine.conditions():
        for model in models:
            assert [len(samples) for samples in engine.measure(model, [2, 1], 3)] == [3, 3]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_large_a_batch_is_said_in_one_line(error: RuntimeError) -> None:
    model = pico_puzzle("kv4+w48")
    hook = model.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(PuzzleError, match=r"scenario.batch_sizes: 4 x 46 tokens do not fit") as caught:
        time_model(model, scenario(), batch_size=4)
    assert "\n" not in str(caught.value)
    hook.remove()
    model.register_forward_pre_hook(lambda *args: torch.zeros(1) @ torch.zeros(2))  # other errors are no lack of memory
    with pytest.raises(RuntimeError, match="size"):
        time_model(model, scenario(), batch_size=1)


def test_freed_memory_is_kept_only_while_measuring() -> None:
    if not keeps_memory(torch.device("cpu")):
        pytest.skip("another C library")
    pages = 2**15
    with TorchEngine(scenario()).conditions():
        faults_of_a_new_tensor(2 * pages)  # the next fits into its place, whatever the heap has been used for
        kept = faults_of_a_new_tensor(pages)
    assert kept < pages / 10
    assert faults_of_a_new_tensor(pages) > pages / 2


def faults_of_a_new_tensor(pages: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(pages * 4096, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
