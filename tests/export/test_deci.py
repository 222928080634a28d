"""DeciLM checkpoints: what readers parse, computed again from the files alone."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.conftest import random_tokens
from tests.export.conftest import SaveChild
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from puzzle.errors import PuzzleError
from puzzle.export.deci import export_deci, ffn_mult
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_puzzle(folder: Path) -> PuzzleForCausalLM:
    """The model that a reader of `block_configs` builds: vLLM's rules, in Puzzle's modules."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    blocks = []
    for block in config.block_configs:
        attention, ffn = {"kind": "none"}, {"kind": "none"}
        if block.attention.replace_with_linear:
            attention = {"kind": "linear"}
        elif not block.attention.no_op:
            kv_heads = config.num_attention_heads // block.attention.n_heads_in_group
            attention = {"kind": "gqa", "num_key_value_heads": kv_heads}
        if block.ffn.replace_with_linear:
            ffn = {"kind": "linear"}
        elif not block.ffn.no_op and hasattr(block.ffn, "ffn_mult"):
            width = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
            ffn = {"kind": "gated", "intermediate_size": width if width % 256 == 0 else width + 256 - width % 256}
        elif not block.ffn.no_op:
            ffn = {"kind": "gated", "intermediate_size": block.ffn.intermediate_size}
        blocks.append({"attention": attention, "ffn": ffn})
    assert len(blocks) == config.num_hidden_layers
    same = ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "rms_norm_eps", "rope_parameters")
    same += ("attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "hidden_act")
    model = PuzzleForCausalLM(PuzzleConfig(blocks=blocks, **{name: getattr(config, name) for name in same}))
    missing, unexpected = model.load_state_dict(weights_in(folder), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def assert_same(model: PuzzleForCausalLM, folder: Path) -> None:
    tokens = random_tokens(2, 16)
    torch.testing.assert_close(as_puzzle(folder)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


SCALED = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "sizes",
    [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, {"rope_parameters": SCALED}],
)
def test_the_files_hold_the_whole_child(save_child: SaveChild, tmp_path: Path, sizes: dict[str, object]) -> None:
    if "rope_parameters" in sizes:
        sizes = {"rope_parameters": SCALED | {"original_max_position_embeddings": 32}}
    model, child = save_child("kv4+w48", "kv2+none", "none+none", "none+w16", "kv1+w20", **sizes)
    assert_same(model, export_deci(child, tmp_path / "out"))


@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True}])
def test_a_first_layer_without_attention_gets_one_that_adds_nothing(
    save_child: SaveChild, tmp_path: Path, sizes: dict[str, object]
) -> None:
    model, child = save_child("none+none", "none+w48", "kv4+w48", **sizes)
    folder = export_deci(child, tmp_path / "out")
    blocks = json.loads((folder / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [4, 1]
    assert_same(model, folder)


def test_linear_parts_for_tensorrt_llm(save_child: SaveChild, tmp_path: Path) -> None:
    model, child = save_child("none+w256", "linear+w512", "kv4+linear", "kv1+none")
    folder = export_deci(child, tmp_path / "out", reader="tensorrt-llm")
    assert {"model.layers.1.self_attn.linear_attn.weight", "model.layers.2.mlp.linear_mlp.weight"} <= set(
        weights_in(folder)
    )
    assert_same(model, folder)


def test_older_names_of_rope_settings_for_readers_that_know_no_others(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w256", rope_parameters=SCALED | {"original_max_position_embeddings": 32})
    config = json.loads((export_deci(child, tmp_path / "out", reader="tensorrt-llm") / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]["rope_type"]) == (1e4, "llama3")
    assert "rope_parameters" not in config


def test_names_and_keys_for_mlx_lm(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w256", "linear+linear", head_dim=8)
    folder = export_deci(child, tmp_path / "out", reader="mlx-lm")
    assert {"model.layers.1.self_attn.linear.weight", "model.layers.1.mlp.linear.weight"} <= set(weights_in(folder))
    for block in json.loads((folder / "config.json").read_text())["block_configs"]:
        assert set(block["attention"]) <= {"no_op", "replace_with_linear", "n_heads_in_group"}
        assert set(block["ffn"]) <= {"no_op", "replace_with_linear", "ffn_mult"}


def test_shards_hold_what_one_file_holds(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48", "kv1+w20")
    whole = export_deci(child, tmp_path / "whole")
    split = export_deci(child, tmp_path / "split", max_shard_bytes=20_000)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(split.glob("*.safetensors"))) > 2
    one, many = weights_in(whole), weights_in(split)
    assert set(one) == set(many) == set(index["weight_map"])
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


def test_what_goes_with_it(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    folder = export_deci(child, tmp_path / "out")
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (child / name).read_bytes()
    assert not (folder / "README.md").exists()
    assert [file.name for file in folder.glob("*.py")] == ["configuration_decilm.py"]
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a").input_ids
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["block_configs"] == json.loads((folder / "config.json").read_text())["block_configs"]


@given(hidden=st.integers(1, 256).map(lambda n: 64 * n), multiple=st.integers(1, 256))
def test_ffn_mult_gives_every_multiple_back(hidden: int, multiple: int) -> None:
    width, multiplier = 256 * multiple, ffn_mult(256 * multiple, hidden)
    found = int(2 * multiplier * hidden / 3)
    assert (found if found % 256 == 0 else found + 256 - found % 256) == width


def test_widths_that_ffn_mult_cannot_express(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    with pytest.raises(PuzzleError, match="cannot express the FFN width 48"):
        export_deci(child, tmp_path / "out", ffn_sizes="ffn_mult")
    assert not (tmp_path / "out").exists()
