"""The rows of a cost table: bytes are those that a model allocates, times those that an additive engine was given."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from tests.costs.conftest import EMPTY_LAYER_MS, FIXED_MS, FakeEngine, planted_ms
from transformers import DynamicCache

from puzzle.artefacts import CostRow, CostTable, Scenario
from puzzle.costs import Engine, Sample
from puzzle.costs.process_engines import LlamaCppEngine, VLLMEngine
from puzzle.costs.roofline import RooflineEngine
from puzzle.costs.table import cost_rows, fixed_memory, stacks_of, subblock_memory
from puzzle.parents import Parent
from puzzle.variants import Architecture, BlockVariant, LayerSpace, Space

BATCH, PROMPT, GENERATED = 3, 7, 5
ARCHITECTURES = [
    ("kv4+w48", "kv4+w48"),
    ("none+w24", "kv2+none", "kv1+linear", "kv4+w8"),  # no attention in layer 0
    ("linear+linear", "none+none", "kv2+w48"),
    ("none+none", "none+w16"),  # no cache at all
    ("kv2q2+w48", "none+w8", "kv1q1win4+none"),  # fewer query heads
    ("kv2win4+w48", "none+w8", "kv4win4s2+none", "kv1win5s3+w48"),  # reached in the prompt
    ("kv2win9+w48", "kv4+none", "kv1win8s2+w48"),  # reached while generating
    ("kv2win64s4+w48", "kv4win13+w8"),  # never reached, the latter by one token
]


@pytest.mark.parametrize(("engine", "tokens"), [(RooflineEngine, 599), (LlamaCppEngine, 1112), (VLLMEngine, 4096)])
def test_engines_cache_more_of_a_layer_than_its_window(engine: type[Engine], tokens: int) -> None:
    """As llama.cpp says of a window of 600 and micro-batches of 512: 1112 cells, rounded up to 1280 of 4096."""
    config = pico_puzzle("kv2win600+w48").config
    variant = Architecture.of(config).blocks[0].attention
    size = subblock_memory(variant, config, torch.float16, 4096, engine.beyond_window)
    assert size.kv_bytes_per_sequence == 2 * 2 * (config.head_dim or 0) * tokens * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("blocks", ARCHITECTURES)
@torch.no_grad()
def test_predicted_bytes_are_the_allocated_ones(
    blocks: tuple[str, ...], overrides: dict[str, object], dtype: torch.dtype
) -> None:
    """Law 10; the cache is that of a batch at full length, after a prefill and all decode steps."""
    model = pico_puzzle(*blocks, **overrides).to(dtype)
    cost = fixed_memory(model.config, dtype)
    for block in Architecture.of(model.config).blocks:
        for variant in block.subblocks:
            cost = cost + subblock_memory(variant, model.config, dtype, PROMPT + GENERATED)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    cache = DynamicCache(config=model.config)
    for tokens in (PROMPT, *[1] * GENERATED):
        model(random_tokens(BATCH, tokens), past_key_values=cache, use_cache=True)
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.kv_bytes_per_sequence * BATCH == allocated


class Rows(FakeEngine):
    """Fills in an FFN of half a millisecond where attention has none, as llama.cpp does."""

    def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().times(stack, batch_size)
        added_ms = 0.5 * sum(block.ffn.absent and not block.attention.absent for block in stack)
        return Sample(prefill_ms=sample.prefill_ms + added_ms, decode_ms=sample.decode_ms)


class LastToken(FakeEngine):
    """Skips three quarters of the last layer's FFN in a prefill."""

    def times(self, stack: Sequence[BlockVariant], batch_size: int) -> Sample:
        sample = super().times(stack, batch_size)
        skipped_ms = 0.75 * planted_ms(stack[-1].ffn.name, batch_size)
        return Sample(prefill_ms=sample.prefill_ms - skipped_ms, decode_ms=sample.decode_ms)


def rows_on(engine: FakeEngine, parent: Parent, space: Space, **noise: Sample) -> dict[tuple[int, str, str], CostRow]:
    """By layer, part and variant; of stacks in `noise`, these times."""
    stacks = stacks_of(space, parent.config)
    samples = {name: [noise.get(name.replace(" ", "_"), engine.times(stack, 1))] for name, stack in stacks.items()}
    scenario = Scenario(engine="torch", device="cpu", dtype="float32", prompt_tokens=4, generated_tokens=2)
    rows = cost_rows(parent.config, space, scenario, 1, samples)
    return {(row.layer, row.part, row.variant): row for row in rows}


@pytest.mark.parametrize("engine", [FakeEngine(), Rows(), LastToken()], ids=lambda engine: type(engine).__name__)
def test_planted_costs_are_recovered_exactly(engine: FakeEngine, parent: Parent, space: Space) -> None:
    """What is filled in for a missing FFN is no cost of attention, and the last FFN may cost less."""
    rows = rows_on(engine, parent, space)
    assert rows.pop((-1, "fixed", "")).prefill_ms == pytest.approx(FIXED_MS + len(space.layers) * EMPTY_LAYER_MS)
    for (layer, part, variant), row in rows.items():
        skips = isinstance(engine, LastToken) and layer == len(space.layers) - 1 and part == "ffn"
        factor = 0.25 if skips else 1.0
        assert row.prefill_ms == pytest.approx(factor * planted_ms(variant, 1), abs=1e-9)
        assert row.decode_ms == pytest.approx(planted_ms(variant, 1) / 10, abs=1e-9)


def test_layers_that_differ_share_what_they_have_in_common(parent: Parent) -> None:
    small, large = Architecture.parse(["none+w16", "kv4+w48"]).blocks
    blocks = (small, large, large)
    space = Space(tuple(LayerSpace((block.attention,), (block.ffn,)) for block in blocks))
    stacks = stacks_of(space, parent.config)
    assert stacks["pads"] == (large, large)
    assert len(stacks) == 4 + 3  # pads, empty layers, whole blocks, no last ffn; w16, kv4, w48
    predicted_ms = sum(row.prefill_ms for row in rows_on(FakeEngine(), parent, space).values())
    assert predicted_ms == pytest.approx(FakeEngine().times(blocks, 1).prefill_ms)


def test_noise_makes_no_cost_negative(parent: Parent, space: Space) -> None:
    low = Sample(prefill_ms=0.5, decode_ms=0.5)
    rows = rows_on(FakeEngine(), parent, space, ffn_linear=low, pads=Sample(prefill_ms=1.0, decode_ms=1.0))
    assert rows[0, "ffn", "linear"].prefill_ms == 0.0
    # Of a model without layers nothing is known then, but that it takes time: the head's share of the pads'.
    config = parent.config
    head, layer = config.vocab_size * config.hidden_size, rows[0, "attention", "kv4"] + rows[0, "ffn", "w48"]
    kv, fixed = 2 * layer.kv_bytes_per_sequence / 4, rows[-1, "fixed", ""]
    assert fixed.decode_ms == pytest.approx(head / (head + 2 * layer.params + kv))


def test_settings_at_their_defaults_stand_nowhere(toy_costs: CostTable) -> None:
    """Neither in the file nor in what is addressed by it, so that tables of before stay where they are; others do."""
    assert not {"tensor_parallel", "gpu_memory"} & {*json.loads(toy_costs.to_json())["scenario"]}
    other = replace(toy_costs, scenario=replace(toy_costs.scenario, tensor_parallel=2, gpu_memory=0.8))
    assert {"tensor_parallel": 2, "gpu_memory": 0.8}.items() <= json.loads(other.to_json())["scenario"].items()
    assert "float32, shared by 2, 80% of its memory, prompt" in str(other.scenario)
    assert [CostTable.from_json(table.to_json()) for table in (toy_costs, other)] == [toy_costs, other]
