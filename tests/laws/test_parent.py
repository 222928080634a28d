"""Law 1: the parent's own variant in every layer gives the parent's logits, bit for bit in float32."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import pico_llama, pico_puzzle, random_tokens
from transformers import LlamaForCausalLM

from puzzle.modeling import save_checkpoint
from puzzle.parents import open_parent


def rope(kind: str, theta: float = 1e4, **fields: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PARENTS: dict[str, dict[str, object]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "head_dim from the hidden size": {"head_dim": None},
    "grouped queries": {"num_key_value_heads": 2},
    "one KV head": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "ffn bias": {"mlp_bias": True},
    "pad token": {"pad_token_id": 5},
    "other activation": {"hidden_act": "gelu_pytorch_tanh"},
    "other base frequency": rope("default", 5e5),
    "linear scaling": rope("linear", factor=2.0),
    "llama3 scaling": rope("llama3", **LLAMA3),
    "yarn scaling": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "dynamic scaling": {"max_position_embeddings": 16} | rope("dynamic", factor=2.0),
}


def original(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def assert_same(path: Path) -> None:
    """Same logits with and without padding, same greedy text; dynamic scaling meets short after long sequences."""
    expected, found = original(path), open_parent(str(path)).load()
    for length in (8, 24, 8):
        tokens_BT = random_tokens(2, length)
        mask_BT = torch.ones_like(tokens_BT)
        mask_BT[0, :3] = 0
        for mask in (None, mask_BT):
            logits = [model(tokens_BT, attention_mask=mask).logits for model in (expected, found)]
            assert torch.equal(*logits)
        texts = [
            model.generate(tokens_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=4, pad_token_id=0)
            for model in (expected, found)
        ]
        assert torch.equal(*texts)


@pytest.mark.parametrize("overrides", PARENTS.values(), ids=PARENTS)
def test_the_rebuilt_parent_computes_the_original(overrides: dict[str, object], tmp_path: Path) -> None:
    pico_llama(**overrides).save_pretrained(tmp_path)
    assert_same(tmp_path)


def test_the_configuration_of_a_parent_without_windows_names_none(tmp_path: Path) -> None:
    pico_llama().save_pretrained(tmp_path)
    parent = open_parent(str(tmp_path))
    assert not {"layer_types", "sliding_window"} & parent.config.to_dict().keys()
    assert parent.config.blocks is not None
    assert parent.config.blocks[0]["attention"] == {"kind": "gqa", "num_key_value_heads": 4}


@torch.no_grad()
def test_a_child_with_windows_as_the_parent(tmp_path: Path) -> None:
    """Its own blocks have windows, and its layers take their masks from its context."""
    child = pico_puzzle("kv4win4+w48", "none+w16", "kv2q2win5s2+w48", "kv4+none")
    save_checkpoint(child, tmp_path, None)
    parent = open_parent(str(tmp_path))
    assert [block.attention.name for block in parent.architecture.blocks] == ["kv4win4", "none", "kv2q2win5s2", "kv4"]
    tokens_BT = random_tokens(2, 12)
    model = parent.load()
    assert torch.equal(model(tokens_BT).logits, child(tokens_BT).logits)
    hidden_BTD = model.embed(tokens_BT)
    context = model.model.context(hidden_BTD)
    for layer in model.model.layers:
        hidden_BTD = layer(hidden_BTD, **context)
    assert torch.equal(model.logits(hidden_BTD), child(tokens_BT).logits)


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    pico_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tmp_path)


def test_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    pico_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert_same(tmp_path)
    model = open_parent(str(tmp_path)).load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    tokens_BT = random_tokens(2, 8)
    assert torch.equal(model(tokens_BT).logits, original(tmp_path, torch.bfloat16)(tokens_BT).logits)


def test_a_head_stored_beside_tied_embeddings(tmp_path: Path) -> None:
    """The same head twice is tied; another one is not, whatever config.json says."""
    for head_differs in (False, True):
        path = tmp_path / str(head_differs)
        model = pico_llama(tie_word_embeddings=False)
        if not head_differs:
            model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        assert_same(path)
        assert open_parent(str(path)).load().config.tie_word_embeddings is not head_differs


def test_a_config_of_older_form(tmp_path: Path) -> None:
    """As Llama 3.1 is published: `rope_theta` and `rope_scaling` side by side."""
    pico_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", **LLAMA3}
    config |= {"rope_theta": 1e4, "rope_scaling": scaling, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(tmp_path)
    assert open_parent(str(tmp_path)).load().model.rotary_emb.rope_type == "llama3"


def test_generation_defaults_are_the_parents(tmp_path: Path) -> None:
    model = pico_llama()
    tokens_BT = random_tokens(1, 8)
    text = model.generate(tokens_BT, do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist()
    model.generation_config.eos_token_id = [127, text[10]]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    found = open_parent(str(tmp_path)).load().generate(tokens_BT, do_sample=False, max_new_tokens=8)
    assert found[0].tolist() == text[: text.index(text[10], 8) + 1]
