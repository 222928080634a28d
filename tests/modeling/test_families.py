"""The contract that every family of transformers keeps, on small models of random weights; what some do otherwise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from puzzle.modeling import PuzzleForCausalLM, puzzle_config, refusal, save_checkpoint, tiny_config
from puzzle.parents import open_parent
from puzzle.variants import SUBBLOCKS, Architecture, ParentSubblock, derive_space, parse_variant, split_state

DENSE = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo"),
    *("olmo2", "olmo3", "smollm3", "exaone4", "glm4", "helium", "stablelm", "seed_oss", "starcoder2", "nemotron"),
    *("apertus", "arcee", "ernie4_5", "hunyuan_v1_dense"),
)
SPARSE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"),
    *("minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe"),
)
every_family = pytest.mark.parametrize("family", [*DENSE, *SPARSE])
TOKENS = 24
"""More than the small models' windows hold."""


def original(family: str) -> PreTrainedModel:
    """The family's own model, whose norms are no identities."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def as_puzzle(model: PreTrainedModel) -> PuzzleForCausalLM:
    puzzle = PuzzleForCausalLM(puzzle_config(model.config)).eval()
    puzzle.load_state_dict(model.state_dict())
    return puzzle


def mixed_child(parent: PuzzleForCausalLM) -> PuzzleForCausalLM:
    """Layer 0 without attention, 1 with other attention and no FFN, 2 with another FFN, 3 empty; of random weights."""
    space = derive_space(parent.config)
    chosen = [[layer.attention[0], layer.ffn[0]] for layer in space.layers]
    chosen[0][0] = chosen[3][0] = parse_variant("attention", "none")
    chosen[1][1] = chosen[3][1] = parse_variant("ffn", "none")
    chosen[1][0], chosen[2][1] = space.layers[1].attention[1], space.layers[2].ffn[1]
    names = [f"{attention}+{ffn}" for attention, ffn in chosen]
    child = PuzzleForCausalLM(Architecture.parse(names).configure(parent.config)).eval()
    own = parent.state_dict()
    for name, value in child.state_dict().items():
        same = name in own and own[name].shape == value.shape
        value.copy_(own[name] if same else 0.1 * torch.randn_like(value))
    return child


@every_family
def test_a_family_is_admitted(family: str) -> None:
    assert refusal(family) == ""


def test_the_page_names_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert f"\n| dense | {', '.join(DENSE)} |\n| mixtures of experts | {', '.join(SPARSE)} |\n" in page


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("cohere2", "its layers add both subblocks at once: they have one norm, input_layernorm"),
        ("lfm2", "its layers are of no known form: their norms are ffn_norm, operator_norm"),
        ("qwen3_next", "has no attribute `self_attn`"),
        ("nanochat", "its logits differ by"),  # its embeddings are normed
        ("bert", ""),
    ],
)
def test_a_family_that_is_refused(family: str, why: str) -> None:
    found = refusal(family)
    assert found
    assert why in found


@torch.no_grad()
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parent_is_read_as_transformers_reads_it(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Law 1, from the names and the tensors of the family's own checkpoints: experts are stored one by one."""
    original(family).to(dtype).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    tokens_BT = torch.randint(128, (2, TOKENS))
    assert torch.equal(open_parent(str(tmp_path)).load(dtype=dtype)(tokens_BT).logits, expected(tokens_BT).logits)


@torch.no_grad()
def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    """Gemma 3: its configuration is `text_config`, its tensors stand beside those of the vision tower."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sees = Gemma3Config(
        text_config=tiny_config("gemma3_text").to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=3,
    )
    model = Gemma3ForConditionalGeneration(sees).eval()
    model.save_pretrained(tmp_path)
    parent, tokens_BT = open_parent(str(tmp_path)), torch.randint(4, 128, (2, TOKENS))
    assert parent.config.base_model_type == "gemma3_text"
    assert torch.equal(parent.load()(tokens_BT).logits, model(tokens_BT).logits)


@torch.no_grad()
@every_family
def test_a_tensor_belongs_to_one_subblock_which_can_be_left_out(family: str) -> None:
    """Law 2, in the first, a middle and the last layer."""
    model = as_puzzle(original(family))
    for layer in model.model.layers:
        states = [split_state(layer.state_dict(), which, model.config) for which in SUBBLOCKS]
        assert states[0].keys() | states[1].keys() == layer.state_dict().keys()
        assert not states[0].keys() & states[1].keys()
    blocks = list(model.config.blocks)
    places = (0, 2, len(blocks) - 1)
    for place in places:
        blocks[place] = {which: {"kind": "none"} for which in SUBBLOCKS}
    empty = PuzzleForCausalLM(type(model.config)(**model.config.to_dict() | {"blocks": blocks})).eval()
    empty.load_state_dict(model.state_dict(), strict=False)
    hidden_BTD = torch.randn(1, 5, model.config.hidden_size)
    for place in places:
        assert torch.equal(empty.model.layers[place](hidden_BTD, **empty.model.context(hidden_BTD)), hidden_BTD)


@torch.no_grad()
@every_family
def test_a_child_generates_with_its_cache_what_it_does_without(family: str) -> None:
    """Laws 6 and 10: one token after another, and the bytes that the cache then holds."""
    child = mixed_child(as_puzzle(original(family)))
    tokens_BT, cache = torch.randint(128, (2, TOKENS)), DynamicCache(config=child.config)
    whole_BTV = child(tokens_BT).logits
    steps = [child(token_B1, past_key_values=cache, use_cache=True).logits for token_B1 in tokens_BT.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole_BTV, atol=2e-5, rtol=1e-5)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    variants = (variant for block in Architecture.of(child.config).blocks for variant in block.subblocks)
    assert held == 2 * sum(variant.kv_bytes(child.config, TOKENS, torch.float32) for variant in variants)


@every_family
def test_parameters_that_a_token_does_not_use(family: str) -> None:
    """Of four experts a token is sent to two, in each layer that has them; shared ones are used by all."""
    parent = as_puzzle(original(family))
    experts = {name: each for name, each in parent.named_parameters() if ".experts." in name}
    assert bool(experts) == (family in SPARSE)
    idle = Architecture.of(parent.config).idle_params(parent.config)
    assert idle == sum(each.numel() for each in experts.values()) // 2


@torch.no_grad()
@every_family
def test_sizes_equal_to_the_parents_change_nothing(family: str) -> None:
    """Law 3: the weights that a variant of these sizes starts from are the parent's."""
    model = as_puzzle(original(family))
    for layer, block in enumerate(Architecture.of(model.config).blocks):
        for own in block.subblocks:
            state = split_state(model.model.layers[layer].state_dict(), own.subblock, model.config)
            started = own.initialise(ParentSubblock(config=model.config, variant=own, state=state, statistics={}))
            assert started.keys() == state.keys()
            assert all(torch.equal(started[name], value) for name, value in state.items())


@torch.no_grad()
@every_family
def test_a_child_is_loaded_again(family: str, tmp_path: Path) -> None:
    """With the buffers that no checkpoint holds."""
    child = mixed_child(as_puzzle(original(family)))
    save_checkpoint(child, tmp_path, extra_files_from=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens_BT = torch.randint(128, (2, TOKENS))
    torch.testing.assert_close(again(tokens_BT).logits, child(tokens_BT).logits, atol=1e-5, rtol=1e-5)


BLOCKS = ("kv4win3+w48", "none+w16", "kv2+none", "kv1win6s2+linear")


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
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "gemma3_text", "exaone4", "olmo2"])
def test_every_layer_has_its_own_window_and_hands_it_on_once(family: str, windows: list[int | None]) -> None:
    """Some attentions know no windows, some ask the configuration, some have them as an attribute and hand them on."""
    parent = puzzle_config(tiny_config(family))
    model = PuzzleForCausalLM(Architecture.parse(["kv2win3+w96", "none+w32", "kv1win6+none"]).configure(parent)).eval()
    model.set_attn_implementation("recorded")
    model(torch.randint(128, (2, 11)))
    assert windows == [3, 6]


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
