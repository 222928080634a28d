"""What a family's own modules may do otherwise than Llama's, and the model's own way through a family's parts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from puzzle.modeling import FAMILIES, PuzzleForCausalLM

BLOCKS = ("kv4win3+w48", "none+w16", "kv2+none", "kv1win6s2+linear")


def child(attention: type[nn.Module], *blocks: str) -> PuzzleForCausalLM:
    """The weights of the same Llama child with this attention; Qwen2's biases are zero."""
    llama = pico_puzzle(*blocks)
    family = FAMILIES["llama"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", replace(family, attention=attention))
        model = PuzzleForCausalLM(llama.config).eval()
    state = {name: llama.state_dict().get(name, torch.zeros_like(value)) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


@pytest.fixture
def windows() -> Iterator[list[int | None]]:
    """What an attention function is told of windows, layer by layer."""
    seen: list[int | None] = []

    def record(*arguments: Any, sliding_window: int | None = None, **named: Any) -> Any:
        seen.append(sliding_window)
        return sdpa_attention_forward(*arguments, **named)

    ALL_ATTENTION_FUNCTIONS.register("recorded", record)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recorded", sdpa_mask)
    yield seen
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        del functions._global_mapping["recorded"]


@torch.no_grad()
@pytest.mark.parametrize("attention", [LlamaAttention, MistralAttention, Qwen2Attention])
def test_every_layer_has_its_own_window_and_hands_it_on_once(
    attention: type[nn.Module], windows: list[int | None]
) -> None:
    """Llama's attention knows no windows, Mistral's asks the configuration for one, Qwen2's has it as an attribute; the
    latter two hand theirs to the attention function themselves.
    """
    tokens_BT = random_tokens(2, 11)
    expected_BTV = pico_puzzle(*BLOCKS)(tokens_BT).logits
    assert torch.equal(child(attention, *BLOCKS)(tokens_BT).logits, expected_BTV)
    recorded = child(attention, "kv4win3+w48", "none+w16", "kv2+none", "kv1win6+linear")
    recorded.set_attn_implementation("recorded")
    recorded(tokens_BT)
    assert windows == [3, None, 6]


@torch.no_grad()
def test_the_parts_of_a_forward() -> None:
    """Embedding, subblock by subblock, final norm and head: the model's own forward."""
    model = pico_puzzle(*BLOCKS)
    tokens_BT = random_tokens(2, 9)
    hidden_BTD = model.embed(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer, block in zip(model.model.layers, model.config.blocks, strict=True):
        for which in ("attention", "ffn"):
            output_BTD = layer.subblock_output(which, hidden_BTD, **context)
            assert (which in layer.norm_names) == bool(output_BTD.any()) == (block[which]["kind"] != "none")
            assert (layer.norm_of(which) is not None) == (which in layer.norm_names)
            hidden_BTD = hidden_BTD + output_BTD
    outputs = model(tokens_BT, output_hidden_states=True)
    assert torch.equal(model.final_norm(hidden_BTD), outputs.hidden_states[-1])
    assert torch.equal(model.logits(hidden_BTD), outputs.logits)
    assert model.config.num_layers == 4
    assert model.config.num_hidden_layers == 3


@torch.no_grad()
def test_a_context_reads_nothing_back_from_the_device() -> None:
    """On `meta` whatever asks for a value fails; with positions it is asked whether they start anew."""
    model = pico_puzzle(*BLOCKS)
    hidden_BTD = torch.empty(2, 9, 32, device="meta")
    model.model.rotary_emb.to("meta")
    context = model.model.context(hidden_BTD)
    assert context["attention_mask"] is None
    assert context["masks"].of(3).shape == (2, 1, 9, 9)
    positions_BT = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    packed = pico_puzzle(*BLOCKS).model.context(torch.randn(2, 9, 32), position_ids=positions_BT)
    assert packed["attention_mask"].sum() == 2 * (10 + 15)
